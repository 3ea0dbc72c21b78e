"""Models: load, check, adapt, read and sample them."""

from __future__ import annotations

import resource

# mlx-lm requests 4,096 open files when it is imported, and fails if the hard limit is lower (or lowers a higher one).
_set = resource.setrlimit
try:
    resource.setrlimit = lambda *_: None
    import mlx_lm.utils  # noqa: F401
finally:
    resource.setrlimit = _set
_soft, _hard = resource.getrlimit(resource.RLIMIT_NOFILE)
if 0 <= _soft < 4096:
    _set(resource.RLIMIT_NOFILE, (4096 if _hard < 0 else min(4096, _hard), _hard))
