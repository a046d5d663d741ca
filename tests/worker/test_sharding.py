"""How a model divides over ranks, and the refusal of sizes that do not."""

import pytest

from asyncengine.checkpoint.sharding import Shard, check_parallel, possible_sizes
from asyncengine.errors import ConfigError
from asyncengine.worker.models.decoder import Decoder
from asyncengine.worker.models.parameters import Linear

from .test_rope import make_spec


@pytest.mark.parametrize("world", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("count", [7, 8, 49152, 100003])
def test_parts_cover_everything_once(count, world):
    parts = [Shard(rank, world).part(count) for rank in range(world)]
    assert [i for part in parts for i in part] == list(range(count))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize(
    ("heads", "kv_heads", "world"), [(9, 3, 3), (8, 2, 4), (8, 2, 8), (8, 8, 4), (6, 1, 3)]
)
def test_every_query_head_finds_its_kv_head(heads, kv_heads, world):
    check_parallel(
        make_spec("default", num_heads=heads, num_kv_heads=kv_heads, intermediate_size=9 * 8), world
    )
    for rank in range(world):
        shard = Shard(rank, world)
        own, own_kv = shard.part(heads), shard.kv_heads(kv_heads)
        for index, head in enumerate(own):
            assert own_kv[index // (len(own) // len(own_kv))] == head // (heads // kv_heads)


@pytest.mark.parametrize("ranks", [2, 4, 0, 65])
def test_refusal_names_the_possible_sizes(ranks):
    spec = make_spec("default", num_heads=9, num_kv_heads=3, intermediate_size=1536)
    with pytest.raises(ConfigError, match=r"possible sizes: 1, 3$") as caught:
        check_parallel(spec, ranks)
    assert (caught.value.parameter, caught.value.value) == ("tensor_parallel_size", ranks)


def test_mlp_must_divide():
    spec = make_spec("default", num_heads=8, num_kv_heads=8, intermediate_size=100)
    assert possible_sizes(spec) == [1, 2, 4]
    with pytest.raises(ConfigError, match="MLP is 100 wide"):
        check_parallel(spec, 8)


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_hold_every_weight_once_but_replicated_kv_heads(world):
    spec = make_spec("default", qkv_bias=True, output_bias=True, mlp_bias=True, num_heads=4, num_kv_heads=2)
    taken = {}
    for rank in range(world):
        for parameter in Decoder(spec, Shard(rank, world)).parameters():
            if not isinstance(parameter, Linear):
                continue
            for source in parameter.sources + parameter.biases:
                columns = source.columns or range(source.shape[1] if len(source.shape) > 1 else 1)
                cells = taken.setdefault(source.name, [])
                cells += [(row, column) for row in source.rows for column in columns]
    for name, cells in taken.items():
        copies = max(1, world // 2) if "k_proj" in name or "v_proj" in name else 1
        assert len(cells) == copies * len(set(cells)), name
