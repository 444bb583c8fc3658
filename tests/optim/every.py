"""Every public optimizer of the package, for the tests of what all of them do:
a new class is tested as soon as it is there."""
import inspect
from functools import partial

import flashoptim_nb.optim as optim

CLASSES = [x for x in vars(optim).values()
           if isinstance(x, type) and issubclass(x, optim.FlashOptimizer) and x is not optim.FlashOptimizer]
# with all its moments
OPTIONS = {cls: dict(momentum=0.9) if "momentum" in inspect.signature(cls).parameters else {} for cls in CLASSES}
MAKERS = {cls.__name__: partial(cls, **options) for cls, options in OPTIONS.items()}
