"""Which words, colours and bins do scenes use? The one table that renderer and questions share.

Red, blue and green belong to the boxes that CV-Bench draws around the objects a question names, so
no object has them: "red" in a question always means the box.
"""

FLAT_SHAPES = ("circle", "square", "triangle", "cross")
SOLID_SHAPES = ("ball", "cube", "cone", "cylinder")
SHAPES = FLAT_SHAPES + SOLID_SHAPES
PLURALS = {name: name + ("es" if name.endswith("s") else "s") for name in SHAPES}

# name -> RGB in 0..1
COLORS = {
    "yellow": (0.95, 0.85, 0.15),
    "purple": (0.58, 0.22, 0.78),
    "orange": (1.00, 0.52, 0.08),
    "cyan": (0.15, 0.80, 0.85),
    "white": (0.97, 0.97, 0.97),
    "brown": (0.47, 0.28, 0.14),
}
COLOR_NAMES = tuple(COLORS)

# Index 0 means "no box".
BOX_NAMES = ("", "red", "blue", "green")
BOX_RGB = ((0.0, 0.0, 0.0), (1.0, 0.0, 0.0), (0.0, 0.0, 1.0), (0.0, 0.8, 0.0))

NUM_CELLS = 8  # positions are told in an 8 x 8 grid, x to the right and y down
NUM_DEPTH_BINS = 8  # z0 nearest ... z7 farthest, equal ratios
NUM_DISTANCE_BINS = 10  # d0 closest ... d9 farthest apart, equal ratios
