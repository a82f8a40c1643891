"""What is asked of NVML, how often, and what its numbers mean. Data only.

Numbers are NVML's own; they are written here so that the agent knows them without loading the binding.
"""

from enum import StrEnum

# Every driver call that a pass makes, numbered as the shared page tells it while it lasts. In brackets: what
# is asked of a function that answers several questions.
CALLS = (
    "", "nvmlInit", "nvmlDeviceGetHandleByIndex", "nvmlDeviceGetHandleByPciBusId", "nvmlDeviceGetUUID",
    "nvmlDeviceGetName", "nvmlDeviceGetPciInfo",
    "nvmlDeviceGetUtilizationRates", "nvmlDeviceGetMemoryInfo", "nvmlDeviceGetClockInfo(SM)",
    "nvmlDeviceGetClockInfo(memory)", "nvmlDeviceGetCurrentClocksEventReasons",
    "nvmlDeviceGetCurrentClocksThrottleReasons", "nvmlDeviceGetPowerUsage", "nvmlDeviceGetFieldValues(fast)",
    "nvmlDeviceGetTemperatureV", "nvmlDeviceGetTemperature", "nvmlDeviceGetMarginTemperature",
    "nvmlDeviceGetTemperatureThreshold(slowdown)", "nvmlDeviceGetTemperatureThreshold(memory)",
    "nvmlDeviceGetFieldValues(heat)",
    "nvmlGpmQueryDeviceSupport", "nvmlGpmSampleGet", "nvmlGpmMetricsGet",
    "nvmlDeviceGetFieldValues(ecc)", "nvmlDeviceGetSramEccErrorStatus", "nvmlDeviceGetFieldValues(rows)",
    "nvmlDeviceGetFieldValues(links)", "nvmlDeviceGetCurrPcieLinkWidth",
    "nvmlDeviceGetCurrPcieLinkGeneration", "nvmlDeviceGetMaxPcieLinkWidth",
    "nvmlDeviceGetMaxPcieLinkGeneration", "nvmlDeviceGetFieldValues(pcie)",
    "nvmlDeviceGetGpuFabricInfoV(3)", "nvmlDeviceGetGpuFabricInfoV(2)",
    "nvmlEventSetWait", "nvmlDeviceRegisterEvents",
)  # fmt: skip
NUMBERS = {call: number for number, call in enumerate(CALLS)}


class Tier(StrEnum):
    """What is sampled together, and so equally often."""

    FAST = "fast"  # utilisation, memory, clocks and why they are held down, power, energy
    HEAT = "heat"  # temperatures, and the action that the driver asks for
    ACTIVITY = "activity"  # GPM
    ECC = "ecc"
    LINKS = "links"  # NVLink
    ROWS = "rows"  # row remapping
    PCIE = "pcie"
    FABRIC = "fabric"


PERIOD_S = {
    Tier.FAST: 1.0, Tier.HEAT: 5.0, Tier.ACTIVITY: 10.0, Tier.ECC: 10.0, Tier.LINKS: 10.0, Tier.ROWS: 30.0,
    Tier.PCIE: 30.0, Tier.FABRIC: 30.0,
}  # fmt: skip

# NVMLError.value
NOT_SUPPORTED, FUNCTION_NOT_FOUND, NO_PERMISSION, VERSION_MISMATCH = 3, 13, 4, 25
TIMEOUT, LIBRARY_NOT_FOUND, DRIVER_NOT_LOADED, LIB_RM_MISMATCH = 10, 12, 9, 18
LOST, RESET_REQUIRED = 15, 16
NEVER = frozenset({2, NOT_SUPPORTED, NO_PERMISSION, FUNCTION_NOT_FOUND, VERSION_MISMATCH, 26})  # asked once
NO_DRIVER = frozenset({LIBRARY_NOT_FOUND, DRIVER_NOT_LOADED})
ENDS_THE_PASS = frozenset({LOST, RESET_REQUIRED, 28})  # nothing else about this GPU will be answered either

# Field ids
POWER_POLICY, THERMAL_POLICY, ENERGY, POWER_AVERAGE, POWER_INSTANT = 74, 75, 83, 185, 186
SW_THERMAL, HW_THERMAL, POWER_BRAKE = 269, 270, 271
POLICY_FIELDS = (POWER_POLICY, THERMAL_POLICY, SW_THERMAL, HW_THERMAL, POWER_BRAKE)
FAST_FIELDS = (*POLICY_FIELDS, ENERGY, POWER_INSTANT, POWER_AVERAGE)
MEMORY_TEMPERATURE, SLOWDOWN_LIMIT, MEMORY_LIMIT, RECOVERY_ACTION = 82, 194, 195, 230
HEAT_FIELDS = (MEMORY_TEMPERATURE, SLOWDOWN_LIMIT, MEMORY_LIMIT, RECOVERY_ACTION)
SBE, DBE = 3, 4  # since the driver was loaded
ECC_FIELDS = (SBE, DBE)
ROWS_CORRECTABLE, ROWS_UNCORRECTABLE, ROWS_PENDING, ROWS_FAILED = 142, 143, 144, 145
ROW_FIELDS = (ROWS_CORRECTABLE, ROWS_UNCORRECTABLE, ROWS_PENDING, ROWS_FAILED)
LINK_REPLAY, LINK_RECOVERY, LINK_CRC, LINK_STATE = 161, 162, 163, 165
LINK_TX, LINK_RX = 138, 139  # KiB over all links: scope ALL_LINKS
_LINK_ERRORS_OF_BLACKWELL = (206, 207, 208, 209, 210, 211, 214)
LINK_ERRORS = frozenset({LINK_REPLAY, LINK_RECOVERY, LINK_CRC, *_LINK_ERRORS_OF_BLACKWELL})
LINK_FIELDS = (LINK_STATE, *sorted(LINK_ERRORS))  # of each link
ALL_LINKS, LINKS_MAX = 0xFFFFFFFF, 36
PCIE_REPLAYS, PCIE_TX, PCIE_RX = 94, 197, 198
PCIE_ERRORS = tuple(range(173, 184))
PCIE_FIELDS = (PCIE_REPLAYS, *PCIE_ERRORS, PCIE_TX, PCIE_RX)

# GPM metrics, in percent
GPM_GRAPHICS, GPM_SM, GPM_TENSOR, GPM_DRAM = 1, 2, 5, 10
GPM_APART_S = 0.1  # samples that lie closer together cannot be compared
GPM_METRICS = (GPM_GRAPHICS, GPM_SM, GPM_TENSOR, GPM_DRAM)

# Bits of the clocks' event reasons, and what they are called. Idle and settings that somebody made are none.
THROTTLE_REASONS = (
    (0x20 | 0x40, "thermal"),
    (0x04, "power"),
    (0x08 | 0x80, "hardware"),
    (0x10 | 0x200 | 0x400, "other"),
)
HARDWARE_THERMAL = 0x40  # sets 0x08 as well: then heat is the reason, not the board

XID_EVENT, RECOVERY_EVENT = 0x8, 0x8000  # types of events
ROW_XIDS = frozenset({48, 63, 64, 94, 95})  # after which rows are looked at, at once

RECOVERY_ACTIONS = {
    0: "none", 1: "reset the GPU", 2: "reboot the node", 3: "drain peer-to-peer", 4: "drain and reset",
    5: "recover the IMEX domain", 6: "reset the bus", 7: "reboot the system",
}  # fmt: skip

FABRIC_NOT_SUPPORTED, FABRIC_IN_PROGRESS, FABRIC_COMPLETED = 0, 2, 3
FABRIC_UNHEALTHY = 2
