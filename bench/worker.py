"""A worker process that measures on request (protocol.py).

The driver (bench/client.py) keeps several workers alive and interleaves their requests. Stock and accelerated each have
their own process and peak memory.
"""

from bench.protocol import serve
from bench.session import Session

__all__ = ["main"]


class Handlers(Session):
    """What a request may name: the methods of Session, and the measurements that need no loaded model."""

    def machine(self) -> dict:
        from bench import machine

        return machine.describe()

    def cpu_info(self) -> dict:
        import qvl_kernels

        return qvl_kernels.cpu_info()

    def bandwidth(self, bytes: int, repeats: int) -> float:
        from qvl_kernels.dispatch import extension

        return extension().read_bandwidth(bytes, repeats)

    def unit_peaks(self, repeats: int) -> dict[str, float]:
        from qvl_kernels.dispatch import extension

        return extension().unit_peaks(repeats)

    def errors(self, path: str, layers: int, image_size: int, text_tokens: int) -> dict:
        from bench import fp64_reference

        return fp64_reference.errors_against_float64(path, layers, image_size, text_tokens)

    def cosines(self, path: str, weights: list[str], layers: int, image_size: int, text_tokens: int) -> dict:
        from bench import fp64_reference

        return fp64_reference.cosines_of_quantised(path, weights, layers, image_size, text_tokens)

    def greedy(self, family: str) -> dict:
        from bench import greedy
        from bench.families import FAMILIES

        return greedy.run(FAMILIES[family].greedy())

    def accuracy(self, model: str, limit: int | None) -> dict:
        from bench import accuracy

        return accuracy.run(model=model, limit=limit)


def main() -> None:
    serve(Handlers())


if __name__ == "__main__":
    main()
