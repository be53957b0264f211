"""A checkpoint of one mesh goes on on any other, with the optimizer's state: in float64, over every ordered pair of meshes."""
import pytest

from mesh_runs import KINDS, MESHES, assert_same_run, train, whole, work  # noqa: F401 (fixtures)


def walk_over_all_pairs(names):
    """A closed walk that goes from each name to each other one once."""
    left, path, walk = {name: [other for other in names if other != name] for name in names}, [names[0]], []
    while path:
        if left[path[-1]]:
            path.append(left[path[-1]].pop())
        else:
            walk.append(path.pop())
    assert len(set(zip(walk, walk[1:]))) == len(walk) - 1 == len(names) * (len(names) - 1)
    return walk


SAVED_ON = ["one", "dp2", "tp2", "pp2", "pp2_tp2", "dp2_tp2_pp2", "dp4_zero3"]
WALK = walk_over_all_pairs(SAVED_ON)


@pytest.mark.parametrize("part, kind", list(enumerate(KINDS)))
def test_every_mesh_goes_on_from_a_checkpoint_of_every_other(work, whole, part, kind):
    third = len(WALK) // len(KINDS)
    meshes = WALK[part * third:(part + 1) * third + 1]
    for number, mesh in enumerate(meshes, 1):
        last = number == len(meshes)
        ranks, keys = MESHES[mesh]
        train(work, kind, f"walk_{kind}", *keys, *([] if last else ["--train.stop_after=1"]), ranks=ranks, status=0 if last else 75)
    assert_same_run(work, kind, f"walk_{kind}", whole[kind])
