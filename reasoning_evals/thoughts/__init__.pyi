from reasoning_evals.thoughts.metrics import AttemptJudge as AttemptJudge
from reasoning_evals.thoughts.segments import SWITCH_MARKERS as SWITCH_MARKERS
from reasoning_evals.thoughts.summary import summarise_thinking as summarise_thinking
from reasoning_evals.thoughts.table import thinking_lines as thinking_lines
from reasoning_evals.thoughts.table import thinking_notes as thinking_notes
from reasoning_evals.thoughts.traced import TracedSample as TracedSample
from reasoning_evals.thoughts.traced import graded_rows as graded_rows
from reasoning_evals.thoughts.traced import trace_run as trace_run
