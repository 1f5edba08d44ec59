"""Whether Ray can give what is asked of it, said before anything waits for it without a word."""

from collections.abc import Mapping

OWN = "isthmus"
"""A resource that marks a Ray which a command started for itself: what it lacks will not come."""


def cluster_has(name: str) -> float:
    """How much of a resource all nodes have, such as CPU; Ray is initialised."""
    import ray

    resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]  # Ray's
    return resources.get(name, 0.0)


def require_resources(bundle: Mapping[str, float], count: int, remedy: str, refused: type[Exception]) -> None:
    """Check that Ray can hold some tasks or workers at once; Ray is initialised.

    A cluster may grow, so there one line says what is waited for.

    Args:
        bundle: what one of them takes, such as CPU and GPU.
        count: how many run at once.
        remedy: what to do where Ray has too little.
        refused: the error.

    Raises:
        refused: Ray was started for this command and has too little.
    """
    if room_for(bundle, most=count) >= count:
        return
    needed = {name: share for name, share in bundle.items() if share}
    found = " and ".join(f"{cluster_has(name):g} {name}" for name in needed)
    asked = " and ".join(f"{share:g} {name}" for name, share in needed.items())
    found = f"found {found}, expected {asked}{f' for each of {count}' if count > 1 else ''}"
    if cluster_has(OWN):
        raise refused(f"Ray has too little on this machine: {found}; {remedy}")
    print(f"waiting for the cluster to grow: {found}; if it does not grow, {remedy}", flush=True)


def room_for(bundle: Mapping[str, float], most: int) -> int:
    """How many tasks or workers the nodes hold at once; Ray is initialised.

    Args:
        bundle: what one of them takes, such as CPU and GPU.
        most: that are counted on one node.
    """
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]  # Ray's
    needed = {name: share for name, share in bundle.items() if share}
    return sum(
        min([most, *(int(node.get(name, 0) / share + 1e-9) for name, share in needed.items())]) for node in nodes
    )
