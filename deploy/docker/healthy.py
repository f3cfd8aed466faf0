"""Asks the service how it is: `healthy.py http://127.0.0.1:8000/healthz` or `healthy.py 127.0.0.1:8103`.

The health check of the images, for Docker alone; Kubernetes asks by itself. Exit status 0: it serves. Anything else:
it does not, and the last line says why.
"""

import sys
import urllib.request

TIMEOUT_S = 3.0


def main(target: str) -> int:
    """Asks once.

    Args:
        target: an http URL, or the `host:port` of a gRPC server with the standard health service.

    Returns:
        0 when it answers that it serves, 1 when it answers otherwise.

    Raises:
        OSError, grpc.RpcError: it does not answer.
    """
    if target.startswith("http://"):
        with urllib.request.urlopen(target, timeout=TIMEOUT_S) as answer:
            return int(answer.status != 200)
    import grpc
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    with grpc.insecure_channel(target) as channel:
        answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=TIMEOUT_S)
    return int(answer.status != health_pb2.HealthCheckResponse.SERVING)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
