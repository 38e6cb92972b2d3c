"""How the reference checkpoint `checkpoints/shapes` was made, and how its pictures are judged."""
