"""Model architectures, one file each. Import as `difax.models`."""

if __name__ != "difax.models":
    raise ImportError(f"import difax.models, not {__name__}: one identity per module")

from difax.models import dit_checkpoint, flux_checkpoint, pixart_checkpoint, sd3_checkpoint, wan_checkpoint
from difax.models.cnn import cnn
from difax.models.dit import dit
from difax.models.flux import flux
from difax.models.pixart import pixart
from difax.models.sd3 import sd3
from difax.models.skip_dit import skip_dit
from difax.models.wan import wan

MODELS = {"dit": dit, "skip_dit": skip_dit, "flux": flux, "pixart": pixart, "wan": wan, "sd3": sd3, "cnn": cnn}
CHECKPOINTS = {
    "dit": dit_checkpoint.PUBLISHED,
    "flux": flux_checkpoint.PUBLISHED,
    "pixart": pixart_checkpoint.PUBLISHED,
    "wan": wan_checkpoint.PUBLISHED,
    "sd3": sd3_checkpoint.PUBLISHED,
}
