"""The prefix cache under exact arithmetic: answers, log-probabilities and versions are, bit for bit, those without it."""

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.exact_engine import Run, check, engine_of, params, prompts

actions = st.one_of(
    st.tuples(st.just("add"), prompts, params, st.integers(1, 3)),
    st.tuples(st.just("add"), prompts, params, st.integers(1, 3)),
    st.tuples(st.just("abort"), st.integers(0, 9)),
    st.tuples(st.just("step"), st.integers(1, 3)),
    st.tuples(st.just("commit")),
)


@settings(max_examples=10, deadline=None)
@given(
    trace=st.lists(actions, min_size=3, max_size=12),
    is_on=st.sampled_from([True, True, False]),
    budget=st.sampled_from([3, 11, 40]),
    blocks=st.integers(0, 20),
    seqs=st.integers(2, 6),
)
def test_any_trace(trace, is_on, budget, blocks, seqs):
    """Requests that begin alike, n of each, aborts, short memory, versions: live ones at `kv_max_age` 0, and pinned ones."""
    source = Run()
    per_block = 2 * 2 * 8 * 4 * 4  # keys and values, heads, dim, bytes, tokens
    memory = per_block * (3 * 4 + 15 + blocks * 4)
    room = {"max_num_seqs": seqs, "kv_cache_bytes": memory, "max_num_kept": seqs}
    engine = engine_of(source, prefix_cache=is_on, max_num_batched_tokens=budget, **room)
    assert engine._runner._is_exact
    asked, got = {}, {}

    def step():
        for delta in engine.step():
            got[delta.request_id].append(delta)
        engine.check()

    for name, *rest in trace:
        if name == "add":
            prompt, own, n = rest
            for sample in range(n):
                request = str(len(asked))
                asked[request], got[request] = (prompt, own.model_copy(update={"seed": own.seed + sample})), []
                engine.add(request, *asked[request])
        elif name == "abort":
            engine.abort(str(rest[0]))
        elif name == "commit":
            source.version += 1
        else:
            for _ in range(rest[0]):
                step()
    while engine.has_work:
        step()
    stats = engine.stats()
    assert (stats.num_free_blocks, stats.num_versions_held) == (stats.num_total_blocks, 0)
    for request, (prompt, own) in asked.items():
        check(prompt, own, got[request])
