"""Tasks of BIG-Bench Hard that can be worked out: solvers of their inputs, and generators of more like them.

The solvers agree with the public targets but for a few that are wrong there; the rest of the benchmark's tasks ask for
knowledge of people, films, jokes or causes, and have no solver.
"""

from mtlora.suite.bbh_tasks import counting, dates, language, logic, ordering, scenes, tracking
from mtlora.suite.bbh_tasks.task import BBHTask, Solution, UnsolvedError

__all__ = ["BBH_TASKS", "BBHTask", "Solution", "UnsolvedError"]

BBH_TASKS: dict[str, BBHTask] = {
    task.id: task for module in (logic, counting, tracking, ordering, language, scenes, dates) for task in module.TASKS
}
