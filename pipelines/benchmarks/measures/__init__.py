"""The measurements of family.py, one module each."""

from measures.anomaly import DISEASE, FAULTY, TEXTURE
from measures.augmentation import AUGMENTATION
from measures.disentanglement import DISENTANGLEMENT
from measures.downstream import DENOISING, LABELS, USES
from measures.reconstruction import RECONSTRUCTION
from measures.regression import REGRESSION
from measures.smoothness import SMOOTHNESS
from measures.variants import ATTENTION, GAN, SRL

MEASURES = (
    RECONSTRUCTION,
    DISEASE,
    FAULTY,
    TEXTURE,
    DISENTANGLEMENT,
    AUGMENTATION,
    REGRESSION,
    DENOISING,
    USES,
    SMOOTHNESS,
    LABELS,
    ATTENTION,
    SRL,
    GAN,
)
