"""Tasks of BIG-Bench Hard that can be worked out: solvers of their inputs, and generators of more like them.

The solvers give the public targets (see `dates` for three texts whose targets contradict them). Most of the benchmark's
other tasks ask for knowledge of people, films, jokes or causes, which nothing can be generated for.
"""

from mtlora.suite.bbh_tasks import counting, dates, language, logic, ordering, scenes, shapes, tables, tracking
from mtlora.suite.bbh_tasks.task import BBHTask, Solution, UnsolvedError

__all__ = ["BBH_TASKS", "BBHTask", "Solution", "UnsolvedError"]

BBH_TASKS: dict[str, BBHTask] = {
    task.id: task
    for module in (logic, counting, tracking, ordering, language, scenes, dates, shapes, tables)
    for task in module.TASKS
}
