"""vLLM's own scheduler, writing down how many tokens it has scheduled."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler


class CountingScheduler(Scheduler):
    """`COLLM_COUNT_TOKENS` names the file that holds the total."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.scheduled_tokens = 0
        self.file = Path(os.environ["COLLM_COUNT_TOKENS"])

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        output = super().schedule(*args, **kwargs)
        if output.total_num_scheduled_tokens:
            self.scheduled_tokens += output.total_num_scheduled_tokens
            self.file.write_text(str(self.scheduled_tokens))
        return output
