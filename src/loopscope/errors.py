"""Every exception that loopscope itself raises.

    LoopscopeError
    ├── UsageError (also a ValueError)   the call was wrong; nothing was changed
    │   ├── GearError                    a gear that does not exist or cannot run
    │   ├── DataError                    data that no step could be run on
    │   ├── StepError                    a step that does not keep its contract
    │   ├── ExperimentError              an experiment that cannot be imported
    │   └── RunError                     a run folder that cannot be used so
    ├── TraceError                       a step of which there is no graph
    ├── WorkerError                      another worker of a training is gone
    ├── ExtraError (also an ImportError)  a package of an extra that is not installed
    └── BackendError (also an ImportError)  a backend that is missing or unknown

An exception of the user's own (in a source, a step, a callback) is never
replaced: it keeps its type and traceback and gets a note naming the step. What the
doctor finds as a training begins is no exception but a `DoctorWarning`.
"""

from __future__ import annotations

from typing import Any


class LoopscopeError(Exception):
    """Base of every exception raised by loopscope.

    Args:
        *said: What is wrong and what to do, in English.
        code: A name for it, where a view has words of another language for it.
        **about: What those words need.
    """

    def __init__(self, *said: object, code: str = "", **about: Any) -> None:
        super().__init__(*said)
        self.code, self.about = code, about


class UsageError(LoopscopeError, ValueError):
    """The call was wrong. Raised before anything was changed."""


class GearError(UsageError):
    """A gear that does not exist, or that this backend or step cannot use."""


class DataError(UsageError):
    """Data that no step could be run on."""


class StepError(UsageError):
    """A step that does not keep the contract of a step."""


class ExperimentError(UsageError):
    """An experiment that cannot be imported, or is not one."""


class RunError(UsageError):
    """A run folder that is missing, damaged, in use, or not the one expected."""


class TraceError(LoopscopeError):
    """A step of which there is no graph. Gear eager runs it; nothing was changed.

    Attributes:
        accumulates: Whether that is since its gradients add up from step to step.
    """

    accumulates = False


class WorkerError(LoopscopeError):
    """Of processes that train together one is gone or hangs, or the chief has failed.

    The variables are as the last finished step left them; without the other worker
    none can be made.
    """


class BackendError(LoopscopeError, ImportError):
    """The Keras backend is missing, or has no room under `backend/`."""


class ExtraError(LoopscopeError, ImportError):
    """A package that only an extra of loopscope installs is missing."""


class DoctorWarning(UserWarning):
    """What the doctor has found as a training began: see docs/doctor.md."""
