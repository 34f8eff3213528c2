from reasoning_evals.tasks.loading import SPECS as SPECS
from reasoning_evals.tasks.loading import load_task as load_task
from reasoning_evals.tasks.loading import task_names as task_names
from reasoning_evals.tasks.loading import task_spec as task_spec
from reasoning_evals.tasks.own_file import is_file_name as is_file_name
from reasoning_evals.tasks.own_file import read_rows as read_rows
from reasoning_evals.tasks.spec import Sampling as Sampling
from reasoning_evals.tasks.spec import TaskSpec as TaskSpec
