"""Named directions and the files that hold them: safetensors, NumPy ``.npy`` and GGUF control vectors."""

from vllm_steer.directions.direction import UNIT_TOLERANCE, Direction
from vllm_steer.directions.files import load_directions, save_directions

__all__ = ["UNIT_TOLERANCE", "Direction", "load_directions", "save_directions"]
