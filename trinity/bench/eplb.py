"""DeepSeek's Expert Parallelism Load Balancer (EPLB), as its README describes it: the baseline of `trinity bench placement`.

Legend: L layers, E experts of a layer, S shards, K slots of a shard, G groups of experts, N nodes, P items, M packs.
Written from the description at github.com/deepseek-ai/EPLB, in numpy and over all layers at once:
  pack          items into packs of equal size, the heaviest first, each into the lightest pack that has room
  replicate     again and again one more replica for the expert whose replicas carry most
  global        replicate all experts, then pack the replicas into shards
  hierarchical  pack groups of experts into nodes, replicate within each node, pack within each node
It starts from nothing at every plan. Two replicas of an expert may meet on a shard, and all numbers must divide.
"""

import numpy as np

from trinity.errors import ConfigError


def plan(load_LE: np.ndarray, num_shards: int, num_slots: int, num_groups: int = 1, num_nodes: int = 1) -> np.ndarray:
    """int64 [L, S, K]: the expert in each slot; `num_slots` in all. One group on one node is the global policy."""
    num_layers, num_experts = load_LE.shape
    for whole, part, what in (
        (num_slots, num_shards, "slots for shards"),
        (num_experts, num_groups, "experts for groups"),
        (num_groups, num_nodes, "groups for nodes"),
        (num_shards, num_nodes, "shards for nodes"),
    ):
        if whole % part:
            raise ConfigError(f"EPLB: {whole} {what} {part} do not divide; choose numbers that do")
    group_E = np.arange(num_experts) // (num_experts // num_groups)
    load_LG = load_LE.reshape(num_layers, num_groups, -1).sum(2)
    node_LE = pack(load_LG, num_nodes)[:, group_E]
    own_LNE = np.argsort(node_LE, 1, kind="stable").reshape(num_layers * num_nodes, -1)  # the experts of each node
    load_XE = np.take_along_axis(np.repeat(load_LE, num_nodes, 0), own_LNE, 1)
    which_XP, each_XP = replicate(load_XE, num_slots // num_nodes)
    shard_XP = pack(each_XP, num_shards // num_nodes)
    slot_XP = np.take_along_axis(which_XP, np.argsort(shard_XP, 1, kind="stable"), 1)
    return np.take_along_axis(own_LNE, slot_XP, 1).reshape(num_layers, num_shards, -1)


def pack(load_LP: np.ndarray, num_packs: int) -> np.ndarray:
    """int64 [L, P]: the pack of each item; every pack gets P / M items."""
    room, row_L = load_LP.shape[1] // num_packs, np.arange(len(load_LP))
    total_LM, num_LM = np.zeros((len(row_L), num_packs)), np.zeros((len(row_L), num_packs), dtype=np.int64)
    pack_LP = np.empty(load_LP.shape, dtype=np.int64)
    for item_L in np.argsort(-load_LP, 1, kind="stable").T:
        lightest_L = np.where(num_LM < room, total_LM, np.inf).argmin(1)
        pack_LP[row_L, item_L] = lightest_L
        total_LM[row_L, lightest_L] += load_LP[row_L, item_L]
        num_LM[row_L, lightest_L] += 1
    return pack_LP


def replicate(load_LE: np.ndarray, num_replicas: int) -> tuple[np.ndarray, np.ndarray]:
    """[L, P] the expert of each replica, and the load of each replica."""
    row_L, num_experts = np.arange(len(load_LE)), load_LE.shape[1]
    num_LE = np.ones(load_LE.shape, dtype=np.int64)
    extra = []
    for _ in range(num_replicas - num_experts):
        extra.append((load_LE / num_LE).argmax(1))
        num_LE[row_L, extra[-1]] += 1
    which_LP = np.concatenate([np.tile(np.arange(num_experts), (len(row_L), 1)), *(e[:, None] for e in extra)], 1)
    return which_LP, np.take_along_axis(load_LE / num_LE, which_LP, 1)
