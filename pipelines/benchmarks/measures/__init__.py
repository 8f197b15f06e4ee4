"""The measurements of family.py, one module each."""

from measures.anomaly import DISEASE, FAULTY, TEXTURE
from measures.disentanglement import DISENTANGLEMENT
from measures.reconstruction import RECONSTRUCTION

MEASURES = (RECONSTRUCTION, DISEASE, FAULTY, TEXTURE, DISENTANGLEMENT)
