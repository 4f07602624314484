"""Solvable tasks of BIG-Bench Hard: solvers of their inputs, and generators of similar inputs.

The solvers give the public targets (`dates` lists three texts whose targets contradict the text). Most other tasks of
the benchmark ask for knowledge of people, films, jokes or causes, and cannot be generated.
"""

from mtlora.suite.bbh_tasks import counting, dates, language, logic, ordering, scenes, shapes, tables, tracking
from mtlora.suite.bbh_tasks.task import BBHTask, Solution, UnsolvedError

__all__ = ["BBH_TASKS", "BBHTask", "Solution", "UnsolvedError"]

BBH_TASKS: dict[str, BBHTask] = {
    task.id: task
    for module in (logic, counting, tracking, ordering, language, scenes, dates, shapes, tables)
    for task in module.TASKS
}
