"""Named directions, how they are made, and their files: safetensors, NumPy ``.npy`` and GGUF control vectors."""

from vllm_steer.directions.direction import UNIT_TOLERANCE, Direction
from vllm_steer.directions.files import load_directions, save_directions
from vllm_steer.directions.methods import make_direction

__all__ = ["UNIT_TOLERANCE", "Direction", "load_directions", "make_direction", "save_directions"]
