# SPDX-License-Identifier: MIT
"""Where weights live: `Place` is what scoring and selection need of it, `Memory` a model's weights.

A checkpoint directory is another place (lap_ext/checkpoint/weights.py).
"""

from lap_ext.places.memory import Memory as Memory
from lap_ext.places.memory import readable as readable
from lap_ext.places.place import Chunk as Chunk
from lap_ext.places.place import Place as Place
