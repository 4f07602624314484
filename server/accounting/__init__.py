"""Records of calls: who changed which adapter, and what each tenant used.

audit.py     a line for every administrative call      usage.py    what each tenant used, and its budgets
journal.py   a record for every answered call          totals.py   the records' sums by hour, tenant and task
"""

from server.accounting.audit import AUDITED, AuditedCall, AuditError, AuditLog
from server.accounting.journal import UsageCounts
from server.accounting.usage import Usage, UsageError

__all__ = ["AUDITED", "AuditError", "AuditLog", "AuditedCall", "Usage", "UsageCounts", "UsageError"]
