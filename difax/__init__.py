"""difax: fast Diffusion Transformers in JAX, as small pure functions that compose in one jitted sampler."""

import pathlib

_here = pathlib.Path(__file__).resolve().parent
if not (_here / "models").is_dir() and (_here.parent / "models").is_dir():
    # a checkout whose in-tree links are plain files (git core.symlinks=false): find the sister folders beside us
    __path__.append(str(_here.parent))

__version__ = "0.1.0"
