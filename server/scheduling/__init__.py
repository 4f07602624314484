"""Decides whose request the engine gets next.

admission.py     the server's door                          scheduler.py     turns, deadlines
quotas.py        what a tenant may take                     bucket.py        a rate limit with bursts
fair_queue.py    the order among tenants                    estimate.py      how long a request will take
fair_thread.py   a thread that tenants share
"""

from server.scheduling.admission import Admission, State
from server.scheduling.quotas import Quotas, Reservation
from server.scheduling.scheduler import Scheduler, Turn, Turns, batch_turns, engine_turns

__all__ = ["Admission", "Quotas", "Reservation", "Scheduler", "State", "Turn", "Turns", "batch_turns", "engine_turns"]
