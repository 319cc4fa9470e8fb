"""A function on a few forked ranks that talk over gloo: for tests that need ranks, and not a model on them."""

import os
import traceback
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist

from flagdit.parallel.ranks import Ranks


def on_ranks(world: int, meeting: Path, function: Callable[[Ranks], int]) -> list[int]:
    """Exit codes of the ranks: what the function returned, 4 where it raised, −n after signal n.

    Args:
        meeting: a file that does not exist yet, where they meet.
    """
    pids = []
    for rank in range(world):
        pid = os.fork()
        if not pid:
            code = 4
            try:
                dist.init_process_group("gloo", store=dist.FileStore(str(meeting), world), rank=rank, world_size=world)
                code = function(Ranks(rank, world))
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        pids.append(pid)
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
