"""The methods, one paper a file. The loop uses them through the interface in method.py alone."""

from training.backbones import Backbone
from training.methods.barlow import Barlow
from training.methods.byol import BYOL
from training.methods.clip import CLIP
from training.methods.clusters import Clusters
from training.methods.dino import DINO
from training.methods.infonce import InfoNCE
from training.methods.margin import Margin
from training.methods.method import Batch, Captioned, Method, Step
from training.methods.moco import MoCo
from training.methods.simclr import SimCLR
from training.methods.simsiam import SimSiam
from training.methods.supcon import SupCon
from training.methods.triplet import Triplet
from training.methods.vicreg import VICReg
from training.recipe import MethodName, Recipe

__all__ = ["METHODS", "Batch", "Captioned", "Method", "Step", "build_method"]

METHODS: dict[MethodName, type[Method]] = {
    "simclr": SimCLR,
    "moco": MoCo,
    "byol": BYOL,
    "simsiam": SimSiam,
    "dino": DINO,
    "barlow": Barlow,
    "vicreg": VICReg,
    "supcon": SupCon,
    "clusters": Clusters,
    "triplet": Triplet,
    "margin": Margin,
    "infonce": InfoNCE,
    "clip": CLIP,
}


def build_method(recipe: Recipe, backbone: Backbone, count: int) -> Method:
    """Build the recipe's method around a backbone, for a source of `count` pictures."""
    return METHODS[recipe.method](recipe, backbone, count)
