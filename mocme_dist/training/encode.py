"""Fused vectors of all entities of a rank, for ranking: in memory if they fit, else one piece at a time.

Blocks begin at multiples of their size, independently of a rank's range, and are always encoded whole. The same kernels
therefore see a row at every world size and in either form, so vectors are equal bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from mocme_dist.evaluation.ranking import RowShard
from mocme_dist.model.mocme import MoCME
from mocme_dist.partition import RowPartition
from mocme_dist.training.step import EntityInput


class EntityEncoder:
    """Encodes a rank's rows block by block; a `Vectors` for ranking that never holds all of them.

    Args:
        model: in evaluation mode while it is used.
        inputs: maps local rows (V,) to inputs of the encoder.
        partition, rank: the rank whose rows are encoded.
        block_rows: number of entities encoded at once.
        piece_rows: largest number of vectors in memory; at least one block is.
        device: where the vectors are.

    Attributes:
        finite: whether all vectors made so far were finite.
        weights_rM: modality weights of the rows, after a pass over the pieces.
    """

    def __init__(
        self,
        model: MoCME,
        inputs: Callable[[Tensor], EntityInput],
        partition: RowPartition,
        rank: int,
        block_rows: int,
        piece_rows: int,
        device: torch.device,
    ) -> None:
        self.model, self.inputs, self.device = model, inputs, device
        self.first, self.last = partition.bounds(rank)
        self.num_rows = self.last - self.first
        self.block_rows = block_rows
        # Under ZeRO-3 parameters are gathered by all ranks together: all must run as many blocks.
        self.rounds = max(len(self._blocks(*partition.bounds(number))) for number in range(partition.num_ranks))
        self.together = any(hasattr(p, "ds_id") for p in model.parameters())
        self.piece_blocks = max(1, piece_rows // block_rows)
        self.num_pieces = -(-self.rounds // self.piece_blocks)
        self.finite = True
        self.weights_rM = torch.empty(0, len(model.modalities))

    def _blocks(self, first: int, last: int) -> range:
        """Return the numbers of the blocks that contain ids of [first, last)."""
        return range(first // self.block_rows, -(-last // self.block_rows)) if last > first else range(0)

    def _bounds(self, turn: int) -> tuple[int, int, int]:
        """Return (first id, local begin, local end) of this rank's block number `turn`; empty after the last one."""
        blocks = self._blocks(self.first, self.last)
        if turn >= len(blocks):
            return self.first, self.num_rows, self.num_rows
        start = blocks[turn] * self.block_rows
        return start, max(self.first, start) - self.first, min(self.last, start + self.block_rows) - self.first

    def _encode(self, turn: int) -> tuple[Tensor, Tensor]:
        """Return vectors and modality weights of this rank's rows in its block number `turn`."""
        start, begin, end = self._bounds(turn)
        offset = begin + self.first - start if end > begin else 0
        # Ranking runs in inference mode; parameters that ZeRO-3 gathers in it could not be trained afterwards.
        with torch.inference_mode(False), torch.no_grad():
            rows = torch.arange(begin, end, device=self.device)
            fused = self.model.encode(*pad_block(self.inputs(rows), offset, self.block_rows))
        here = slice(offset, offset + end - begin)
        self.finite = self.finite and bool(torch.isfinite(fused.z_VD[here]).all())
        return fused.z_VD[here], fused.inter_VM[here]

    def whole(self) -> RowShard:
        """Return all vectors of this rank."""
        z_rD = torch.empty(self.num_rows, self.model.blocks.total, device=self.device)
        for piece in self._pieces(range(self.rounds), 1):
            z_rD[piece.first - self.first :][: piece.num_rows] = piece.z_rD
        return RowShard(z_rD, self.first)

    def pieces(self) -> Iterator[RowShard]:
        """See `Vectors`; a piece is valid until the next one is made."""
        return self._pieces(range(self.rounds), self.piece_blocks)

    def _pieces(self, turns: range, blocks: int) -> Iterator[RowShard]:
        # One buffer for all pieces, because two of them and the blocks of a third would need the memory that pieces
        # save. One for the weights, too: a small tensor per block fragmented the heap by 300 MB per million rows.
        weights_rM = torch.empty(self.num_rows, len(self.model.modalities), device=self.device)
        buffer_ND = torch.empty(
            min(blocks * self.block_rows, self.num_rows), self.model.blocks.total, device=self.device
        )
        for start in range(0, len(turns), blocks):
            begin = end = self._bounds(start)[1]
            for turn in turns[start : start + blocks]:
                z_VD, weight_VM = self._encode(turn)
                buffer_ND[end - begin : end - begin + len(z_VD)] = z_VD
                weights_rM[end : end + len(z_VD)] = weight_VM
                end += len(z_VD)
            yield RowShard(buffer_ND[: end - begin], self.first + begin)
        self.weights_rM = weights_rM

    def pick(self, ids_Q: np.ndarray) -> Tensor:
        """See `Vectors`; encodes every block that contains one of the entities, as a whole."""
        out_QD = torch.zeros(len(ids_Q), self.model.blocks.total, device=self.device)
        local_Q = torch.from_numpy(ids_Q).to(self.device) - self.first
        for turn in range(self.rounds):
            _, begin, end = self._bounds(turn)
            here_Q = (local_Q >= begin) & (local_Q < end)
            if self.together or bool(here_Q.any()):
                out_QD[here_Q] = self._encode(turn)[0][local_Q[here_Q] - begin]
        return out_QD


def pad_block(entities: EntityInput, offset: int, size: int) -> tuple[dict[str, Tensor], Tensor]:
    """Return features and presence of a block of `size` rows with the entities at `offset`; the other rows are absent
    zeros."""
    after = size - offset - entities.present_MV.shape[1]
    raw = {name: torch.nn.functional.pad(value, (0, 0, offset, after)) for name, value in entities.raw.items()}
    return raw, torch.nn.functional.pad(entities.present_MV, (offset, after))
