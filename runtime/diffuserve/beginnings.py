"""What requests begin with: images to be made, or those of a snapshot that another server took."""

from __future__ import annotations

from dataclasses import replace

from diffuserve.engine import Demand, Group
from diffuserve.errors import InvalidArgumentError
from diffuserve.lora.choice import lora_key
from diffuserve.registry import CheckpointRegistry
from diffuserve.request import GenerateRequest
from diffuserve.rollout.live import LiveRollout
from diffuserve.snapshot import ImageState, Snapshot, decode_snapshot

__all__ = ["Beginnings", "demands"]


class Beginnings:
    """Resolves requests with the checkpoints that they ask for. `key` is what snapshots are signed with."""

    def __init__(self, checkpoints: CheckpointRegistry, rollout: LiveRollout, key: bytes) -> None:
        self._checkpoints, self._rollout, self._key = checkpoints, rollout, key

    def of(self, request: GenerateRequest, request_id: str) -> Snapshot:
        """Raises DiffuserveError for a request that cannot be served."""
        return self._resumed(request) if request.resume else self._begun(request, request_id)

    def _begun(self, request: GenerateRequest, request_id: str) -> Snapshot:
        """A new request, with all of its images to be made."""
        name, alias = self._rollout.choose(request, request_id)
        checkpoint = self._checkpoints.find(name)
        resolved = replace(checkpoint.resolve(request), alias=alias)
        return Snapshot(
            resolved=resolved,
            weights=checkpoint.manifest.key,
            trajectory=checkpoint.trajectory(resolved),
            first=0,
            images=tuple(map(ImageState.new, range(request.num_images))),
        )

    def _resumed(self, request: GenerateRequest) -> Snapshot:
        """A request that was begun elsewhere, reported as this one asks."""
        snapshot = decode_snapshot(request.resume, self._key)
        resolved = snapshot.resolved
        checkpoint = self._checkpoints.find(resolved.checkpoint)
        if snapshot.weights != checkpoint.manifest.key:
            raise InvalidArgumentError(
                f"the snapshot was taken of another export of {checkpoint.name}; resume it where the very same one is "
                "deployed",
                input="resume",
            )
        checkpoint.check_states(resolved, snapshot.images)
        read = checkpoint.read(resolved)
        if read.embeddings != resolved.embeddings:
            raise InvalidArgumentError(
                f"the snapshot's prompts were read with the embeddings {', '.join(resolved.embeddings) or 'none'}, and "
                f"here with {', '.join(read.embeddings) or 'none'}; give servers that hand over to each other the same",
                input="resume",
            )
        if lora_key(read.loras) != lora_key(resolved.loras):
            named = [
                ", ".join(f"{file['name']} ({file['digest'][:16]})" for file in one.loras) for one in (resolved, read)
            ]
            raise InvalidArgumentError(
                f"the snapshot was taken with the LoRAs {named[0]}, and here they are {named[1]}; give servers that "
                "hand over to each other the same",
                input="resume",
            )
        return replace(
            snapshot,
            resolved=checkpoint.with_pictures(replace(read, request=resolved.request.answered_as(request))),
        )


def demands(beginning: Snapshot) -> list[Demand]:
    """What a request's images take, each on its own."""
    resolved = beginning.resolved
    group, priority = Group(resolved.checkpoint, resolved.height, resolved.width), resolved.request.priority
    last = beginning.first + beginning.trajectory.evaluations
    chunks, adapter = resolved.reading.chunks, lora_key(resolved.loras)
    length = beginning.trajectory.evaluations
    return [
        Demand(group, resolved.rows, last - image.evaluation, priority, chunks, length=length, adapter=adapter)
        for image in beginning.images
    ]
