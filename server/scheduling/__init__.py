"""Whose request the engine gets next.

admission.py     the server's state, requests in flight     scheduler.py     turns, quotas, deadlines
fair_queue.py    the order among tenants                    bucket.py        a rate limit with bursts
estimate.py      how long a request will take            fair_thread.py   a thread that tenants share
"""

from server.scheduling.scheduler import Reservation, Scheduler, Turn

__all__ = ["Reservation", "Scheduler", "Turn"]
