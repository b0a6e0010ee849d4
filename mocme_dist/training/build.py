"""Constructs a rank's worker from the configuration, top to bottom, and the pieces of it that other code needs.

The order: modalities, partition, feature stores, batches, model, engine, entity table. Nothing else constructs them.
"""

from __future__ import annotations

import importlib.util
import logging
import sysconfig
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mocme_dist.batching.batch import BatchMaker
from mocme_dist.batching.sampler import QuerySampler
from mocme_dist.config import Config
from mocme_dist.config.evaluation import EvaluationConfig
from mocme_dist.config.model import ExpertsConfig, FusionConfig
from mocme_dist.config.schema import DataConfig, DeepSpeedConfig, EntitiesConfig, FeaturesConfig, NegativesConfig
from mocme_dist.config.train import TrainConfig
from mocme_dist.data.dataset import Dataset
from mocme_dist.data.features import FeatureStore
from mocme_dist.errors import ConfigError, DataError, MocmeError
from mocme_dist.kernels.builder import compiler, complaint, try_compiler
from mocme_dist.kernels.row_update import row_update
from mocme_dist.memory import map_large_tensors
from mocme_dist.model.blocks import Blocks, make_blocks
from mocme_dist.model.entropy import Weighting
from mocme_dist.model.experts import Experts
from mocme_dist.model.fusion import FusionSettings
from mocme_dist.model.loss import LossSettings
from mocme_dist.model.mocme import MoCME, ModelSettings
from mocme_dist.parallel.comm import Comm
from mocme_dist.parallel.optim import choose_optimizer
from mocme_dist.parallel.table import EntityTable
from mocme_dist.partition import RowPartition
from mocme_dist.training.compatibility import run_identity
from mocme_dist.training.deepspeed_engine import make_engine
from mocme_dist.training.engine import Engine
from mocme_dist.training.engine_rows import EngineRows, row_parameter
from mocme_dist.training.graph_step import GraphStep, Padding
from mocme_dist.training.prefetch import DevicePrefetcher
from mocme_dist.training.rates import parameter_groups
from mocme_dist.training.step import StepModule
from mocme_dist.training.tally import Tally
from mocme_dist.training.timer import PhaseTimer
from mocme_dist.training.worker import Worker

log = logging.getLogger(__name__)

# Models of so many bytes map large tensors one by one; smaller ones waste less by gaps than page faults would cost.
# With 400 MB of values a rank at stage 1 takes 2,425 instead of 3,070 MiB, and 40 % more processor time per step.
LARGE_MODEL_BYTES = 256 << 20

_NO_RECORDING = (
    "train.cuda_graphs: needs a GPU and compile=on; here are {device} and compile={compile}; set it to auto or false"
)


def build_worker(config: Config, dataset: Dataset, comm: Comm) -> Worker:
    """Return one rank's worker, ready to step and to rank; collective.

    Raises:
        ConfigError, DataError: settings do not fit the machine or each other, or features are missing or damaged.
    """
    c, device = config, comm.device
    on_gpu = device.type == "cuda"
    timer = PhaseTimer()
    modalities = resolve_modalities(c.modalities, dataset)
    partition = RowPartition(dataset.num_entities, comm.world_size)
    first, last = partition.bounds(comm.rank)

    held = feature_modalities(c.modalities, c.evidence.spaces, dataset)
    stores = _open_stores(dataset, held, (first, last), c.features, comm)
    prefetcher = DevicePrefetcher(device)
    seen_r = prefetcher.send(torch.from_numpy(dataset.seen(np.arange(first, last))))

    triples_T3 = dataset.triples("train")
    maker = BatchMaker(
        triples_T3,
        dataset.known("train"),
        dataset.num_entities,
        QuerySampler(len(triples_T3), c.train.batch_size, c.train.seed),
        c.negatives.chunk_size,
        c.num_negatives,
        comm.rank,
        comm.world_size,
        c.deepspeed.gradient_accumulation_steps,
    )

    compiled = use_compiler(c.compile, device)
    if c.train.cuda_graphs is True and not (compiled and on_gpu):
        raise ConfigError(_NO_RECORDING.format(device=device.type, compile=c.compile))
    width = model_blocks(c.fusion, c.experts, modalities).width
    raw_widths = {name: width if name == "structure" else stores[name].width for name in modalities}
    graph = _encodes_in_graph(compiled and on_gpu, c.deepspeed.stage, comm.rank)
    settings = model_settings(c, len(modalities))._replace(compiled=graph)
    model = _make_model(raw_widths, dataset.num_relations, settings, c, device)
    _set_statistics(model, {name: stores[name] for name in modalities if name != "structure"}, comm)

    in_engine = c.entities.sharding == "zero"
    rows: nn.Embedding | None = None
    if in_engine:
        rows = row_parameter(partition, width, c.entities.init_range, c.train.seed, device)
    loss = loss_settings(c.train, c.negatives, c.rotate.gamma, compiled, model.blocks.num, on_gpu)
    module = StepModule(model, loss, comm, timer, rows)
    groups = parameter_groups(module, c.train, c.entities, c.relations, c.mine)
    apart = "rows.weight" if in_engine else None
    engine = make_engine(module, groups, c.train.gradient_clipping, c.deepspeed, comm, apart)

    table = (
        EngineRows(engine, rows, partition, comm.rank)
        if rows is not None
        else _make_table(c.entities, c.train, partition, width, compiled, comm)
    )
    tally = Tally(device)
    graph_step = choose_graph(c, compiled, module, engine, table, tally, stores, seen_r, maker)
    return Worker(
        config=config,
        dataset=dataset,
        comm=comm,
        timer=timer,
        modalities=modalities,
        partition=partition,
        stores=stores,
        prefetcher=prefetcher,
        seen_r=seen_r,
        looks_up_ahead=looks_up_ahead(c.features, c.deepspeed, on_gpu),
        block_rows=block_rows(c.evaluation, dataset.num_entities),
        maker=maker,
        model=model,
        compiled=compiled,
        engine=engine,
        table=table,
        identity=run_identity(config, dataset, modalities, table.optimizer),
        tally=tally,
        graph=graph_step,
    )


def choose_graph(
    config: Config,
    compiled: bool,
    module: StepModule,
    engine: Engine,
    table: EntityTable | EngineRows,
    tally: Tally,
    stores: Mapping[str, FeatureStore],
    seen_r: Tensor,
    maker: BatchMaker,
) -> GraphStep | None:
    """Return what takes steps as graphs (train.one_graph), or None if `train_step` does.

    Raises:
        ConfigError: it is asked for and does not hold here; with the reason.
    """
    wanted, fusion, comm = config.train.one_graph, config.fusion, module.comm
    if wanted is False or (wanted == "auto" and comm.device.type != "cuda"):
        return None
    adam = engine.plain_adam
    reasons = {
        "compile is off or finds no compiler": not compiled,
        f"there are {comm.world_size} ranks": comm.world_size > 1,
        "deepspeed.gradient_accumulation_steps is not 1": config.deepspeed.gradient_accumulation_steps > 1,
        "an optimizer of ZeRO updates the dense parameters (deepspeed.engine=torch or stage 0 do not)": adam is None,
        "no kernel updates the rows (entities.sharding=rows and dtype=float32 have one)": (
            isinstance(table, EngineRows) or not table.has_kernel
        ),
        "fusion weights depend on this step's estimates (fusion.weight_gradient=stop and scope=global do not)": (
            fusion.estimator == "mine" and (fusion.weight_gradient, fusion.scope) != ("stop", "global")
        ),
    }
    if found := [text for text, holds in reasons.items() if holds]:
        if wanted is True:
            raise ConfigError(f"train.one_graph: {'; '.join(found)}; correct that or set it to auto")
        return None
    assert adam is not None and isinstance(table, EntityTable)
    used = {name: stores[name] for name in module.model.modalities if name != "structure"}
    padding = Padding(min(maker.most_ids, table.last - table.first), config.mine.rows)
    return GraphStep(
        module,
        engine,
        adam,
        table,
        tally,
        used,
        seen_r,
        padding,
        recorded=comm.device.type == "cuda" and config.train.cuda_graphs is not False,
    )


def _encodes_in_graph(on_gpu: bool, stage: int, rank: int) -> bool:
    """Return whether encoding is one compiled graph; rank 0 warns if ZeRO-3 takes it away.

    ZeRO-3 fetches parameters in hooks of the modules, which a graph cannot contain. On a CPU, encoding is little but
    matrix products: the graph was as fast as eager code and took tens of seconds to compile.
    """
    if on_gpu and stage == 3 and rank == 0:
        log.warning(
            "deepspeed.stage=3: encoding runs without the graph that stages 0 to 2 have, because ZeRO-3 fetches "
            "parameters in hooks; the loss keeps its kernels. The cost on a GPU is not measured (docs/cluster.md)"
        )
    return on_gpu and stage < 3


def _make_table(
    entities: EntitiesConfig, train: TrainConfig, partition: RowPartition, width: int, compiled: bool, comm: Comm
) -> EntityTable:
    """Return this rank's rows of the entity table, at their initial values."""
    return EntityTable(
        partition,
        comm.rank,
        width,
        optimizer=choose_optimizer(entities.optimizer, partition.num_rows),
        learning_rate=entities.learning_rate or train.learning_rate,
        weight_decay=entities.row_weight_decay,
        init_range=entities.init_range,
        seed=train.seed,
        dtype=getattr(torch, entities.dtype),
        device=comm.device,
        fused=row_update(comm.device.type) if compiled else None,
    )


def _make_model(
    raw_widths: Mapping[str, int], num_relations: int, settings: ModelSettings, config: Config, device: torch.device
) -> MoCME:
    """Return the model at its initial values, after the allocator was told whether it is large."""
    with torch.device("meta"):
        shapes = MoCME(raw_widths, num_relations, settings)
    if sum(p.numel() * p.element_size() for p in shapes.parameters()) >= LARGE_MODEL_BYTES:
        map_large_tensors()
    model = MoCME(raw_widths, num_relations, settings, config.train.seed).to(device)
    # One tensor of all modalities is gathered (stage 3) and reduced (2) as a whole.
    if config.deepspeed.stage >= 2 and isinstance(model.experts, Experts):
        model.experts = model.experts.divided()
    return model


def open_dataset(config: DataConfig) -> Dataset:
    """Return the packed data set of a run whose paths are resolved.

    Raises:
        ConfigError: neither data.dataset nor data.raw is set.
    """
    if config.dataset is None:
        raise ConfigError("data.dataset: not set; give a packed data set (data.dataset) or a raw folder (data.raw)")
    return Dataset.open(config.dataset)


def resolve_modalities(wanted: str | Sequence[str], dataset: Dataset) -> tuple[str, ...]:
    """Return the modalities to fuse, structure first; "auto" stands for all that the data set has.

    Raises:
        DataError: the data set does not have one of them.
    """
    has = ("structure", *dataset.modalities)
    names = has if wanted == "auto" else tuple(wanted)
    if missing := [name for name in names if name not in has]:
        raise DataError(
            f"{dataset.directory}: no {', '.join(missing)} in this data set; it has {', '.join(has)}; "
            "set `modalities` to those or auto"
        )
    return names


def feature_modalities(wanted: str | Sequence[str], spaces: str | Sequence[str], dataset: Dataset) -> tuple[str, ...]:
    """Return the modalities whose features a worker needs.

    Args:
        wanted: the setting modalities, see `resolve_modalities`.
        spaces: the setting evidence.spaces, which may name modalities that the model does not fuse.
    """
    fused = [name for name in resolve_modalities(wanted, dataset) if name != "structure"]
    if spaces == "all":
        return tuple(dict.fromkeys([*fused, *dataset.modalities]))
    if spaces == "auto":
        return tuple(fused)
    named = ["numeric" if space == "coordinates" else space for space in spaces]
    return tuple(dict.fromkeys([*fused, *(name for name in dataset.modalities if name in named)]))


def _open_stores(
    dataset: Dataset, names: Sequence[str], rows: tuple[int, int], config: FeaturesConfig, comm: Comm
) -> dict[str, FeatureStore]:
    """Return the feature stores of this rank's rows; if one rank's features are damaged, all ranks raise the error."""
    stores, error = {}, None
    # Features in the host's memory are copied to a GPU by the prefetcher.
    device = str(comm.device) if config.residency == "device" else "cpu"
    try:
        for name in names:
            dataset.bring_features(name, *rows)
            stores[name] = FeatureStore.open(dataset.directory, name, *rows, config.residency, device, config.on_bad)
    except MocmeError as cause:
        error = cause
    comm.raise_together(error)
    return stores


def _set_statistics(model: MoCME, stores: Mapping[str, FeatureStore], comm: Comm) -> None:
    """Give the projections mean and deviation of the present raw features over all ranks."""
    for name, store in stores.items():
        sums = torch.zeros(1 + 2 * store.width, dtype=torch.float64)
        for rows in torch.arange(store.num_rows).split(8192):
            values_UF, present_U = store.gather(rows)
            values_UF = values_UF[present_U].double().cpu()
            sums += torch.cat([torch.tensor([float(len(values_UF))]), values_UF.sum(0), values_UF.square().sum(0)])
        count, total_F, square_F = comm.sum(sums.to(comm.device)).cpu().split([1, store.width, store.width])
        mean_F = total_F / count.clamp_min(1)
        std_F = (square_F / count.clamp_min(1) - mean_F.square()).clamp_min(0).sqrt()
        model.projections.by_modality[name].set_statistics(mean_F.float(), std_F.float())  # type: ignore[operator]


def identity_of(config: Config) -> dict[str, Any]:
    """Return `Worker.identity` of the workers that a configuration makes, from its packed data set."""
    dataset = open_dataset(config.data)
    in_engine = config.entities.sharding == "zero"
    optimizer = "adam" if in_engine else choose_optimizer(config.entities.optimizer, dataset.num_entities)
    return run_identity(config, dataset, resolve_modalities(config.modalities, dataset), optimizer)


def looks_up_ahead(features: FeaturesConfig, deepspeed: DeepSpeedConfig, on_gpu: bool) -> bool:
    """Return whether the background thread looks up features of coming steps, to hide a disk or a GPU's bus.

    Features in memory beside a CPU have no wait to hide: all cores have work, and gather faster together than one of
    them in the background. A step in several micro-batches exists to save memory, so each is looked up when its turn
    comes.
    """
    waits = on_gpu or features.residency == "mmap"
    return waits and deepspeed.gradient_accumulation_steps == 1


def block_rows(config: EvaluationConfig, num_entities: int) -> int:
    """Return the number of entities that are encoded together: blocks lie at its multiples, and are encoded whole."""
    return min(config.encode_rows, -(-num_entities // 64) * 64)


def model_settings(config: Config, num_modalities: int) -> ModelSettings:
    """Return sizes and switches of the model that a configuration asks for."""
    fusion, mine = config.fusion, config.mine
    return ModelSettings(
        width=config.experts.width,
        num_experts=config.experts.count_for(num_modalities),
        experts=config.experts.kind,
        residual=config.experts.residual,
        recompute=config.experts.recompute,
        experts_dropout=config.experts.dropout,
        projection_hidden=config.projection.hidden,
        projection_dropout=config.projection.dropout,
        structure=config.projection.structure,
        gamma=config.rotate.gamma,
        form=fusion.form,
        precision=config.train.precision,
        fusion=FusionSettings(
            estimator=fusion.estimator,
            scope=fusion.scope,
            weight_gradient=fusion.weight_gradient,
            temperature=fusion.temperature,
            normalize=fusion.normalize,
            hidden=mine.hidden,
            ema=mine.ema,
            bounded=mine.bounded,
            clip=mine.clip,
            rows=mine.rows,
        ),
    )


def model_blocks(fusion: FusionConfig, experts: ExpertsConfig, modalities: Sequence[str]) -> Blocks:
    """Return how the vectors of a model of these modalities are divided into blocks."""
    return make_blocks(fusion.form, len(modalities), experts.width)


def loss_settings(
    train: TrainConfig, negatives: NegativesConfig, gamma: float, compiled: bool, blocks: int = 1, on_gpu: bool = False
) -> LossSettings:
    """Return the loss that a configuration asks for.

    Args:
        gamma: the setting rotate.gamma.
        compiled: use the compiled path instead of the plain one.
        blocks: number of blocks of a vector.
        on_gpu: whether the ranks have a GPU.
    """
    n = negatives
    weighting = Weighting(
        n.weighting, n.easy_below, n.hard_from, n.weight_easy, n.weight_ambiguous, n.weight_hard, n.temperature
    )
    recorded = compiled and on_gpu if train.cuda_graphs == "auto" else train.cuda_graphs
    return LossSettings(train.loss, gamma, weighting, compiled, recorded, blocks)


def use_compiler(choice: str, device: torch.device) -> bool:
    """Return whether to compile the hot path; the setting "auto" does so if everything it needs is found.

    Raises:
        ConfigError: the setting is "on" and something is missing.
    """
    if choice == "off":
        return False
    missing = compiler_lacks(device)
    problem = f"{missing} found on this machine" if missing else compiler_fails(device)
    if problem and choice == "on":
        raise ConfigError(f"compile: on, but {problem}; correct that or set compile=off")
    if problem:
        log.warning("%s: the loss runs in its plain form, about a hundred times slower", problem)
    return problem is None


def compiler_lacks(device: torch.device) -> str | None:
    """Return what torch.compile would miss here, as the start of a sentence; it would fail at the first step."""
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        return "no triton is"
    if compiler() is None:
        return "no C++ compiler is"
    # Debian and Ubuntu have them in a package of their own.
    if not Path(sysconfig.get_paths()["include"], "Python.h").is_file():
        return "no Python.h (headers of Python; python3-dev) is"
    return None


@cache
def compiler_fails(device: torch.device) -> str | None:
    """Return why torch.compile fails here, by compiling one sum, because an installed compiler may not work."""
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        # torch caches what it has built: a compiler that has stopped working since would only fail at a new graph.
        try_compiler(get_cpp_compiler())
        torch.compile(torch.add, dynamic=False)(torch.ones(8, device=device), 1)
    except Exception as error:  # torch wraps errors of a compiler, a linker or a loader in its own
        return f"the compiler fails ({complaint(getattr(error, 'inner_exception', error))})"
    return None
