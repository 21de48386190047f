"""The exceptions that a command turns into one line (see `f2llm_jax.cli.command`)."""


class UserError(ValueError):
    """Bad input: a flag, a file, a column, a model, a configuration. The message names what is wrong, where, and the remedy.

    Raised as it is, or as a subclass where a caller has to tell it apart. Any other exception is a bug and keeps its traceback.
    """


class DivergedError(UserError):
    """A run whose losses, gradients or parameters are not finite; the message names the update and the remedy."""


class Preempted(Exception):
    """The run stopped on request with its state saved; the message says where. The same command resumes."""


HUNG = 76  # exit code of a run that ended itself because it hung (EX_PROTOCOL of sysexits.h): run the same command again
