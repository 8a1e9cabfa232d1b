"""The order in which the examples of the gallery are shown."""

ORDER = (
    "plot_ct_dicom.py",
    "plot_ct_beamline.py",
    "plot_ct_tooth.py",
    "plot_mri_kspace.py",
    "plot_idt_stack.py",
    "plot_choose_tau.py",
    "plot_tv_bm3d.py",
    "plot_two_forms.py",
    "plot_oder.py",
    "plot_diagnose.py",
    "plot_train.py",
    "plot_own_operator.py",
    "plot_own_denoiser.py",
    "plot_deepinv_physics.py",
    "plot_deepinv_algorithms.py",
)


class ByReading:
    """The key by which sphinx-gallery sorts files."""

    def __init__(self, folder: str) -> None:
        del folder

    def __call__(self, name: str) -> int:
        """Return where a file comes: as `ORDER` has it."""
        return ORDER.index(name)
