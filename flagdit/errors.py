"""Errors that a user can act on.

Each carries three parts and prints as one paragraph: what is wrong, where (recipe key, file or flag), how to fix it.
They derive from ValueError because the user's input is at fault; our own mistakes stay `assert`s and tracebacks.
"""


class FlagDiTError(ValueError):
    """Base of all errors shown to users without a traceback.

    Args:
        what: the fault, naming the value, e.g. "model.num_heads=5 must divide model.dim=512".
        where: the recipe key, file or flag at fault; empty when `what` names it already.
        fix: what to do about it, e.g. "try 4 or 8".
    """

    exit_code = 2
    """Of the command that prints the error."""

    def __init__(self, what: str, *, where: str = "", fix: str = ""):
        self.what, self.where, self.fix = what, where, fix
        head = f"{where}: {what}" if where else what
        # After a list of faults, the fix for all of them stands on a line of its own.
        between = "\n" if "\n" in head else ". "
        super().__init__(f"{head.rstrip('.')}{between}{fix}" if fix else head)

    def __reduce__(self) -> tuple:
        # Exceptions cross process boundaries (loader workers, spawned ranks); keyword arguments must survive pickling.
        return (_rebuild, (type(self), self.what, self.where, self.fix), self.__dict__)


def _rebuild(cls: type, what: str, where: str, fix: str) -> FlagDiTError:
    return cls(what, where=where, fix=fix)


class RecipeError(FlagDiTError):
    """A recipe, override or command-line flag is wrong."""


class DataError(FlagDiTError):
    """A data set, shard, sample or source file is wrong."""


class CheckpointError(FlagDiTError):
    """A checkpoint or run folder cannot be read or written."""


class LaunchError(FlagDiTError):
    """Processes cannot be started or have died; `exit_code` is then that of the process that failed."""

    def __init__(self, what: str, *, where: str = "", fix: str = "", exit_code: int = 2):
        super().__init__(what, where=where, fix=fix)
        self.exit_code = exit_code
