"""Models: where they come from, what they may say, and how they are read, adapted and sampled from."""

from __future__ import annotations

import resource

# mlx-lm asks for 4,096 open files as it is imported, and dies where the hard limit is lower (or lowers a higher one).
_set = resource.setrlimit
try:
    resource.setrlimit = lambda *_: None
    import mlx_lm.utils  # noqa: F401
finally:
    resource.setrlimit = _set
_soft, _hard = resource.getrlimit(resource.RLIMIT_NOFILE)
if 0 <= _soft < 4096:
    _set(resource.RLIMIT_NOFILE, (4096 if _hard < 0 else min(4096, _hard), _hard))
