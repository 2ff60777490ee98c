"""Model architectures, one file each. Import as `difax.models`."""

if __name__ != "difax.models":
    raise ImportError(f"import difax.models, not {__name__}: one identity per module")

from difax.models import (
    dit_checkpoint,
    flux2_checkpoint,
    flux_checkpoint,
    pixart_checkpoint,
    qwen_image_checkpoint,
    sd3_checkpoint,
    wan_checkpoint,
    z_image_checkpoint,
)
from difax.models.cnn import cnn
from difax.models.dit import dit
from difax.models.flux import flux
from difax.models.flux2 import flux2
from difax.models.pixart import pixart
from difax.models.qwen_image import qwen_image
from difax.models.sd3 import sd3
from difax.models.skip_dit import skip_dit
from difax.models.wan import wan
from difax.models.z_image import z_image

MODELS = {
    "dit": dit,
    "skip_dit": skip_dit,
    "flux": flux,
    "pixart": pixart,
    "wan": wan,
    "sd3": sd3,
    "qwen_image": qwen_image,
    "flux2": flux2,
    "z_image": z_image,
    "cnn": cnn,
}
CHECKPOINTS = {
    "dit": dit_checkpoint.PUBLISHED,
    "flux": flux_checkpoint.PUBLISHED,
    "pixart": pixart_checkpoint.PUBLISHED,
    "wan": wan_checkpoint.PUBLISHED,
    "sd3": sd3_checkpoint.PUBLISHED,
    "qwen_image": qwen_image_checkpoint.PUBLISHED,
    "flux2": flux2_checkpoint.PUBLISHED,
    "z_image": z_image_checkpoint.PUBLISHED,
}
