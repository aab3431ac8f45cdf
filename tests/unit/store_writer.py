"""A process that stages and commits versions until it is killed: all elements of a version are its number."""

import torch

from trinity.state.versioned_store import Store, Version

LIKE = {"a": torch.empty(1 << 14), "b": torch.empty(6, 500), "c": torch.empty(1 << 14)}


def write_for_ever(folder, ready):
    torch.set_num_threads(1)
    store = Store(folder)
    if store.committed < 0:
        store.put(made(store, 0))
        store.commit(0)
    ready.send(store.committed)
    while True:
        number = store.committed + 1
        if number % 3 == 0:  # a step that is given up
            made(store, number)
            store.discard_staged()
        store.retire([number - 2], lambda name: name != "c")
        store.put(made(store, number))
        store.commit(number)


def made(store, number):
    tensors = {name: store.empty_like(tensor).fill_(number) for name, tensor in LIKE.items()}
    return Version(number, tensors, {"number": number})
