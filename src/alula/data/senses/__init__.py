"""Point clouds, depth, surface normals, motion and brain responses: references, and readers of their files.

One file per medium; `point_files` and `rasters` know the formats, `arrays` NPY.
"""

from alula.data.senses.depth import DepthRef
from alula.data.senses.motion import MotionRef
from alula.data.senses.normals import NormalsRef
from alula.data.senses.points import PointsRef
from alula.data.senses.response import ResponseRef

__all__ = ["PointsRef", "DepthRef", "NormalsRef", "MotionRef", "ResponseRef"]
