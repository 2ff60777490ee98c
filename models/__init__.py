"""Model architectures, one file each. Import as `difax.models`."""

if __name__ != "difax.models":
    raise ImportError(f"import difax.models, not {__name__}: one identity per module")

from difax.models.cnn import cnn
from difax.models.dit import dit

MODELS = {"dit": dit, "cnn": cnn}
