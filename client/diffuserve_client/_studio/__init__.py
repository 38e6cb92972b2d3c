"""The commands that make many pictures at once: `compare`, `storyboard` and `angles`.

Each command is a module. What they share: `batch` runs requests, `folder` is where files go, `contact_sheet` lays
pictures out. Pillow, scikit-image, imageio and the others are imported when they are used.
"""

from __future__ import annotations

__all__: list[str] = []
