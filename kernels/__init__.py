"""Triton kernels of molt, imported as ``molt.kernels``."""

if __name__ == "kernels":
    raise ImportError(
        "this folder is molt's Triton kernels: import it as 'molt.kernels'. The name 'kernels' belongs to another "
        "package; take the root of molt's source tree off sys.path to import that one."
    )
