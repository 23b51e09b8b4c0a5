"""Which problems this process answers when `accelerate launch` starts several processes."""

from __future__ import annotations

import os
from dataclasses import dataclass


@dataclass(frozen=True)
class Shard:
    """One process of `world`: it answers every `world`-th problem, starting at `rank`."""

    rank: int = 0
    world: int = 1

    @classmethod
    def of_this_process(cls) -> Shard:
        if int(os.environ.get("WORLD_SIZE", 1)) == 1:
            return cls()
        from accelerate import PartialState

        from ..model.accelerator import LONGEST_WAIT, default_device

        state = PartialState(cpu=default_device().type == "cpu", timeout=LONGEST_WAIT)
        return cls(state.process_index, state.num_processes)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def wait(self) -> None:
        """Wait until all processes have reached this point."""
        if self.world > 1:
            from accelerate import PartialState

            PartialState().wait_for_everyone()
