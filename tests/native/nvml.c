/* A stand-in for libnvidia-ml.so.1, for machines without a GPU: as much of NVML as keepstep's probes ask for.
 *
 * What it answers stands in a file that tests map and write (KEEPSTEP_NVML_CONTROL), so a GPU can be lost, an
 * XID can fire and a call can hang while the library is in use. tests/nvml_standin.py mirrors the layout.
 *
 *   -DOLD_DRIVER   leaves out what drivers before 12 did not have: the symbols are really not there.
 */
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

typedef int ret_t;
enum {
    SUCCESS = 0, UNINITIALIZED = 1, INVALID_ARGUMENT = 2, NOT_SUPPORTED = 3, NOT_FOUND = 6, TIMEOUT = 10,
    DRIVER_NOT_LOADED = 9, GPU_IS_LOST = 15, ARGUMENT_VERSION_MISMATCH = 25
};

#define GPUS 16
#define FIELDS 320
#define LINKS 36
#define EVENTS 64
#define MAGIC 0x6b737031u

typedef struct {
    char uuid[48], bus[24], name[64];
    uint32_t answer;        /* what every call about it answers; 0: as usual */
    char hang[64];          /* the function that does not come back while this names it; "*": any */
    char refused[256];      /* functions that are not supported, each between two spaces */
    uint32_t utilisation, memory_utilisation, sm_clock, memory_clock, power_mw;
    int32_t temperature, slowdown, memory_max, margin;
    uint64_t memory_total, memory_used, reasons, sram_uncorrectable, sram_correctable;
    uint32_t pcie_width, pcie_generation, pcie_width_max, pcie_generation_max;
    uint32_t gpm, fabric_state, fabric_status, fabric_health, fabric_summary, clique;
    uint8_t cluster[16];
    double activity[32];    /* by GPM metric, in percent */
    uint8_t field_answer[FIELDS]; /* an error, by field; 0: none */
    uint64_t field[FIELDS];
    uint64_t link[8][LINKS]; /* fields 161-168, by link */
    uint32_t links;
    uint64_t calls;         /* how often anything was asked about it */
} gpu_t;

typedef struct {
    uint32_t magic, gpus;
    uint32_t init_answer, init_hangs;
    char driver[32], nvml[32];
    uint32_t struct_newest; /* the newest version of versioned structs that this driver knows; 0: all */
    volatile uint64_t events;
    struct { uint32_t gpu, type; uint64_t data; } event[EVENTS];
    gpu_t gpu[GPUS];
} control_t;

static control_t *control;
static int initialised;

static ret_t map_control(void) {
    const char *path = getenv("KEEPSTEP_NVML_CONTROL");
    if (control) return SUCCESS;
    int file = path ? open(path, O_RDWR | O_CLOEXEC) : -1;
    if (file < 0) return DRIVER_NOT_LOADED;
    void *where = mmap(NULL, sizeof(control_t), PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    close(file);
    if (where == MAP_FAILED || ((control_t *)where)->magic != MAGIC) return DRIVER_NOT_LOADED;
    control = where;
    return SUCCESS;
}

static void rest(long milliseconds) {
    struct timespec time = {milliseconds / 1000, milliseconds % 1000 * 1000000};
    nanosleep(&time, NULL);
}

static int listed(const char *list, const char *name) {
    char padded[80];
    snprintf(padded, sizeof padded, " %s ", name);
    return strstr(list, padded) != NULL;
}

/* Whether a call about this GPU goes on, and what it answers if it does not. */
static ret_t enter(gpu_t *gpu, const char *name) {
    if (!initialised) return UNINITIALIZED;
    if (!gpu || gpu < control->gpu || gpu >= control->gpu + GPUS) return INVALID_ARGUMENT;
    __atomic_fetch_add(&gpu->calls, 1, __ATOMIC_RELAXED);
    while (*(volatile char *)gpu->hang && (!strcmp(gpu->hang, name) || !strcmp(gpu->hang, "*"))) rest(5);
    if (gpu->answer) return (ret_t)gpu->answer;
    return gpu->refused[0] && listed(gpu->refused, name) ? NOT_SUPPORTED : SUCCESS;
}
#define ENTER(gpu) do { ret_t answer = enter(gpu, __func__); if (answer) return answer; } while (0)

#ifndef OLD_DRIVER
static ret_t newest(uint32_t version) {
    return control->struct_newest && version >> 24 > control->struct_newest ? ARGUMENT_VERSION_MISMATCH : SUCCESS;
}
#endif

/* ---------------------------------------------------------------- system */

ret_t nvmlInitWithFlags(unsigned flags) {
    (void)flags;
    ret_t answer = map_control();
    if (answer) return answer;
    while (*(volatile uint32_t *)&control->init_hangs) rest(5);
    if (control->init_answer) return (ret_t)control->init_answer;
    initialised = 1;
    return SUCCESS;
}
ret_t nvmlInit_v2(void) { return nvmlInitWithFlags(0); }
ret_t nvmlShutdown(void) { initialised = 0; return SUCCESS; }
const char *nvmlErrorString(ret_t value) { (void)value; return "an error of the stand-in"; }

static ret_t text(char *to, unsigned length, const char *from) {
    if (strlen(from) >= length) return 7;
    strcpy(to, from);
    return SUCCESS;
}
ret_t nvmlSystemGetDriverVersion(char *version, unsigned length) { return text(version, length, control->driver); }
ret_t nvmlSystemGetNVMLVersion(char *version, unsigned length) { return text(version, length, control->nvml); }
ret_t nvmlDeviceGetCount_v2(unsigned *count) {
    if (!initialised) return UNINITIALIZED;
    *count = control->gpus;
    return SUCCESS;
}

/* ---------------------------------------------------------------- identity */

ret_t nvmlDeviceGetHandleByIndex_v2(unsigned index, gpu_t **device) {
    if (index >= control->gpus) return INVALID_ARGUMENT;
    ENTER(&control->gpu[index]);
    *device = &control->gpu[index];
    return SUCCESS;
}
ret_t nvmlDeviceGetHandleByPciBusId_v2(const char *bus, gpu_t **device) {
    for (unsigned k = 0; k < control->gpus; k++)
        if (!strcasecmp(control->gpu[k].bus + (strlen(bus) == 12 ? 4 : 0), bus)) /* 0000:0f:00.0 will do */
            return nvmlDeviceGetHandleByIndex_v2(k, device);
    return NOT_FOUND;
}
ret_t nvmlDeviceGetUUID(gpu_t *gpu, char *uuid, unsigned length) { ENTER(gpu); return text(uuid, length, gpu->uuid); }
ret_t nvmlDeviceGetName(gpu_t *gpu, char *name, unsigned length) { ENTER(gpu); return text(name, length, gpu->name); }
typedef struct { char legacy[16]; unsigned domain, bus, device, id, subsystem; char bus_id[32]; } pci_t;
ret_t nvmlDeviceGetPciInfo_v3(gpu_t *gpu, pci_t *pci) {
    ENTER(gpu);
    memset(pci, 0, sizeof *pci);
    snprintf(pci->bus_id, sizeof pci->bus_id, "%s", gpu->bus);
    return SUCCESS;
}

/* ---------------------------------------------------------------- samples */

typedef struct { unsigned gpu, memory; } rates_t;
ret_t nvmlDeviceGetUtilizationRates(gpu_t *gpu, rates_t *rates) {
    ENTER(gpu);
    rates->gpu = gpu->utilisation;
    rates->memory = gpu->memory_utilisation;
    return SUCCESS;
}
typedef struct { unsigned long long total, free, used; } memory_t;
ret_t nvmlDeviceGetMemoryInfo(gpu_t *gpu, memory_t *memory) {
    ENTER(gpu);
    memory->total = gpu->memory_total;
    memory->used = gpu->memory_used;
    memory->free = gpu->memory_total - gpu->memory_used;
    return SUCCESS;
}
ret_t nvmlDeviceGetClockInfo(gpu_t *gpu, unsigned type, unsigned *clock) {
    ENTER(gpu);
    *clock = type == 2 ? gpu->memory_clock : gpu->sm_clock;
    return SUCCESS;
}
ret_t nvmlDeviceGetCurrentClocksThrottleReasons(gpu_t *gpu, unsigned long long *reasons) {
    ENTER(gpu);
    *reasons = gpu->reasons;
    return SUCCESS;
}
ret_t nvmlDeviceGetPowerUsage(gpu_t *gpu, unsigned *power) { ENTER(gpu); *power = gpu->power_mw; return SUCCESS; }
ret_t nvmlDeviceGetTemperature(gpu_t *gpu, unsigned sensor, unsigned *temperature) {
    ENTER(gpu);
    (void)sensor;
    *temperature = (unsigned)gpu->temperature;
    return SUCCESS;
}
ret_t nvmlDeviceGetTemperatureThreshold(gpu_t *gpu, unsigned type, unsigned *temperature) {
    ENTER(gpu);
    int value = type == 1 ? gpu->slowdown : type == 2 ? gpu->memory_max : 0;
    if (value <= 0) return NOT_SUPPORTED;
    *temperature = (unsigned)value;
    return SUCCESS;
}
ret_t nvmlDeviceGetCurrPcieLinkWidth(gpu_t *gpu, unsigned *value) { ENTER(gpu); *value = gpu->pcie_width; return SUCCESS; }
ret_t nvmlDeviceGetCurrPcieLinkGeneration(gpu_t *gpu, unsigned *value) { ENTER(gpu); *value = gpu->pcie_generation; return SUCCESS; }
ret_t nvmlDeviceGetMaxPcieLinkWidth(gpu_t *gpu, unsigned *value) { ENTER(gpu); *value = gpu->pcie_width_max; return SUCCESS; }
ret_t nvmlDeviceGetMaxPcieLinkGeneration(gpu_t *gpu, unsigned *value) { ENTER(gpu); *value = gpu->pcie_generation_max; return SUCCESS; }

typedef struct {
    uint32_t field, scope;
    int64_t timestamp, latency;
    uint32_t type, answer;
    union { double d; uint32_t u; uint64_t ull; int64_t sll; int32_t si; } value;
} field_t;
ret_t nvmlDeviceGetFieldValues(gpu_t *gpu, int count, field_t *values) {
    ENTER(gpu);
    for (int k = 0; k < count; k++) {
        field_t *one = &values[k];
        one->answer = one->field < FIELDS ? gpu->field_answer[one->field] : INVALID_ARGUMENT;
        if (one->answer) continue;
        memset(&one->value, 0, sizeof one->value);
        if (one->field >= 161 && one->field <= 168) {
            if (one->scope >= gpu->links) { one->answer = INVALID_ARGUMENT; continue; }
            one->type = 3;
            one->value.ull = gpu->link[one->field - 161][one->scope];
        } else if (one->field >= 193 && one->field <= 196) {
            one->type = 5;
            one->value.si = (int32_t)gpu->field[one->field];
        } else if (one->field == 82 || one->field == 144 || one->field == 145 || one->field == 230) {
            one->type = 1;
            one->value.u = (uint32_t)gpu->field[one->field];
        } else {
            one->type = 3;
            one->value.ull = gpu->field[one->field];
        }
    }
    return SUCCESS;
}

#ifndef OLD_DRIVER
ret_t nvmlDeviceGetCurrentClocksEventReasons(gpu_t *gpu, unsigned long long *reasons) {
    ENTER(gpu);
    *reasons = gpu->reasons;
    return SUCCESS;
}
typedef struct { uint32_t version, sensor; int32_t temperature; } temperature_t;
ret_t nvmlDeviceGetTemperatureV(gpu_t *gpu, temperature_t *temperature) {
    ENTER(gpu);
    if (newest(temperature->version)) return ARGUMENT_VERSION_MISMATCH;
    temperature->temperature = gpu->temperature;
    return SUCCESS;
}
typedef struct { uint32_t version; int32_t margin; } margin_t;
ret_t nvmlDeviceGetMarginTemperature(gpu_t *gpu, margin_t *margin) {
    ENTER(gpu);
    margin->margin = gpu->margin;
    return SUCCESS;
}
typedef struct {
    uint32_t version;
    uint64_t aggregate[3], parity, secded, correctable, bucket[5];
    uint32_t exceeded;
} sram_t;
ret_t nvmlDeviceGetSramEccErrorStatus(gpu_t *gpu, sram_t *status) {
    ENTER(gpu);
    status->parity = gpu->sram_uncorrectable;
    status->secded = 0;
    status->correctable = gpu->sram_correctable;
    return SUCCESS;
}
typedef struct {
    uint32_t version;
    uint8_t cluster[16];
    uint32_t status, clique, state, health;
    uint8_t summary;
} fabric_t;
ret_t nvmlDeviceGetGpuFabricInfoV(gpu_t *gpu, fabric_t *fabric) {
    ENTER(gpu);
    if (newest(fabric->version)) return ARGUMENT_VERSION_MISMATCH;
    memcpy(fabric->cluster, gpu->cluster, sizeof fabric->cluster);
    fabric->status = gpu->fabric_status;
    fabric->clique = gpu->clique;
    fabric->state = gpu->fabric_state;
    fabric->health = gpu->fabric_health;
    if (fabric->version >> 24 >= 3) fabric->summary = (uint8_t)gpu->fabric_summary;
    return SUCCESS;
}

/* ---------------------------------------------------------------- GPM */

typedef struct { gpu_t *gpu; struct timespec at; } gpm_t;
typedef struct { uint32_t metric, answer; double value; const char *names[3]; } metric_t;
typedef struct { uint32_t version, count; gpm_t *first, *second; metric_t metric[1]; } metrics_t;
typedef struct { uint32_t version, supported; } support_t;
ret_t nvmlGpmQueryDeviceSupport(gpu_t *gpu, support_t *support) { ENTER(gpu); support->supported = gpu->gpm; return SUCCESS; }
ret_t nvmlGpmSampleAlloc(gpm_t **sample) { *sample = calloc(1, sizeof **sample); return SUCCESS; }
ret_t nvmlGpmSampleFree(gpm_t *sample) { free(sample); return SUCCESS; }
ret_t nvmlGpmSampleGet(gpu_t *gpu, gpm_t *sample) {
    ENTER(gpu);
    sample->gpu = gpu;
    clock_gettime(CLOCK_MONOTONIC, &sample->at);
    return SUCCESS;
}
ret_t nvmlGpmMetricsGet(metrics_t *metrics) {
    gpm_t *first = metrics->first, *second = metrics->second;
    if (!first->gpu || first->gpu != second->gpu) return INVALID_ARGUMENT;
    double apart = (double)(second->at.tv_sec - first->at.tv_sec) + (double)(second->at.tv_nsec - first->at.tv_nsec) / 1e9;
    if (apart < 0.1) return INVALID_ARGUMENT; /* as the real one: it has nothing to compare */
    for (uint32_t k = 0; k < metrics->count; k++) {
        metric_t *one = &metrics->metric[k];
        one->answer = one->metric < 32 ? SUCCESS : NOT_SUPPORTED;
        one->value = one->metric < 32 ? first->gpu->activity[one->metric] : 0.0;
    }
    return SUCCESS;
}
#endif

/* ---------------------------------------------------------------- events */

typedef struct { uint64_t next; uint64_t types[GPUS]; } set_t;
typedef struct { gpu_t *gpu; unsigned long long type, data; unsigned instance, compute; } event_t;
ret_t nvmlEventSetCreate(set_t **set) {
    if (!initialised) return UNINITIALIZED;
    *set = calloc(1, sizeof **set);
    (*set)->next = control->events; /* what was raised before is never delivered */
    return SUCCESS;
}
ret_t nvmlEventSetFree(set_t *set) { free(set); return SUCCESS; }
ret_t nvmlDeviceGetSupportedEventTypes(gpu_t *gpu, unsigned long long *types) {
    ENTER(gpu);
#ifdef OLD_DRIVER
    *types = 0x8;
#else
    *types = 0x8008;
#endif
    return SUCCESS;
}
ret_t nvmlDeviceRegisterEvents(gpu_t *gpu, unsigned long long types, set_t *set) {
    ENTER(gpu);
    set->types[gpu - control->gpu] = types;
    return SUCCESS;
}
static ret_t next_event(set_t *set, event_t *event, unsigned timeout) {
    struct timespec now, end;
    clock_gettime(CLOCK_MONOTONIC, &end);
    end.tv_sec += timeout / 1000;
    end.tv_nsec += timeout % 1000 * 1000000L;
    for (;;) {
        while (set->next < control->events) {
            if (control->events - set->next > EVENTS) set->next = control->events - EVENTS; /* it forgets, too */
            uint32_t gpu = control->event[set->next % EVENTS].gpu, type = control->event[set->next % EVENTS].type;
            uint64_t data = control->event[set->next++ % EVENTS].data;
            if (gpu >= GPUS || !(set->types[gpu] & type)) continue;
            *event = (event_t){.gpu = &control->gpu[gpu], .type = type, .data = data, .instance = ~0u, .compute = ~0u};
            return SUCCESS;
        }
        clock_gettime(CLOCK_MONOTONIC, &now);
        if (now.tv_sec > end.tv_sec + 1 || now.tv_sec * 1000000000L + now.tv_nsec >= end.tv_sec * 1000000000L + end.tv_nsec)
            return TIMEOUT;
        rest(20);
    }
}
ret_t nvmlEventSetWait_v2(set_t *set, event_t *event, unsigned timeout) { return next_event(set, event, timeout); }
