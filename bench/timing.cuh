// cuvq: GPU vector quantization. SPDX-License-Identifier: Apache-2.0
//
// How a GPU row is timed. Launches are captured in a graph, as many as take about a millisecond, so that the host's
// launch latency is no part of the time; a sample is one replay between two events; the row is the median of the
// samples. Before them the card rests as long, or what it is timed at would depend on the rows before: a card that has
// drawn all the power it may for half a second lowers its clocks by a fifth.
#pragma once

#include <algorithm>
#include <chrono>
#include <cmath>
#include <thread>
#include <vector>

#include <cuda_runtime.h>

#include <cuvq/cuda_error.cuh>

#include "rows.hpp"

namespace cuvq::bench {

/// Keeps the GPU busy while the host queues what is timed next. On an idle stream the first event would be stamped at
/// once, and the time until the graph arrives would count.
static __global__ void hold_the_stream(long long cycles) {
    const long long start = clock64();
    while (clock64() - start < cycles) {
    }
}

/// How long: 25 to 50 us at clocks of 2 to 1 GHz. A host that needs longer to queue an event and a graph adds the rest
/// to a sample of, mostly, a millisecond.
inline constexpr long long lead_cycles = 50000;

class stopwatch {
public:
    /// @param seconds spent on the samples of a row
    /// @param fewest  samples that are taken however long they take
    explicit stopwatch(double seconds, std::size_t fewest = 3) : seconds_(seconds), fewest_(fewest) {
        CUVQ_CHECK_CUDA(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking));
        CUVQ_CHECK_CUDA(cudaEventCreate(&start_));
        CUVQ_CHECK_CUDA(cudaEventCreate(&stop_));
    }
    stopwatch(const stopwatch&) = delete;
    stopwatch& operator=(const stopwatch&) = delete;
    ~stopwatch() {
        cudaEventDestroy(start_);
        cudaEventDestroy(stop_);
        cudaStreamDestroy(stream_);
    }

    cudaStream_t stream() const { return stream_; }
    void wait() const { CUVQ_CHECK_CUDA(cudaStreamSynchronize(stream_)); }

    /// @param sets    input sets to rotate over
    /// @param prepare put on the stream before every sample, not timed: prepare()
    /// @param launch  what is timed: launch(set), 0 <= set < sets
    template <class Prepare, class Launch>
    measured time(int sets, Prepare&& prepare, Launch&& launch) {
        prepare();
        launch(0);  // loads the module, makes handles; may take long
        wait();
        double us = 0;
        begin();
        for (int set = 0; set < sets; ++set) launch(set);
        us = end() / sets;

        measured m;
        m.sets = sets;
        m.launches = static_cast<int>(std::min(100.0, std::max(1.0, std::ceil(1000.0 / us))));
        m.launches = (m.launches + sets - 1) / sets * sets;
        const graph g(*this, [&] {
            for (int i = 0; i < m.launches; ++i) launch(i % sets);
        });
        prepare();
        CUVQ_CHECK_CUDA(cudaGraphLaunch(g, stream_));
        wait();
        std::this_thread::sleep_for(std::chrono::duration<double>(seconds_));

        std::vector<double> samples;
        double total = 0;
        while (samples.size() < fewest_ || (total < seconds_ * 1e6 && samples.size() < 201)) {
            prepare();
            hold_the_stream<<<1, 1, 0, stream_>>>(lead_cycles);
            begin();
            CUVQ_CHECK_CUDA(cudaGraphLaunch(g, stream_));
            samples.push_back(end());
            total += samples.back();
        }
        std::sort(samples.begin(), samples.end());
        m.us = samples[samples.size() / 2] / m.launches;
        m.us_min = samples[0] / m.launches;
        return m;
    }

private:
    class graph {
    public:
        template <class Body>
        graph(const stopwatch& w, Body&& body) {
            cudaGraph_t captured = nullptr;
            CUVQ_CHECK_CUDA(cudaStreamBeginCapture(w.stream_, cudaStreamCaptureModeThreadLocal));
            try {
                body();
            } catch (...) {
                cudaStreamEndCapture(w.stream_, &captured);
                if (captured) cudaGraphDestroy(captured);
                cudaGetLastError();
                throw;
            }
            CUVQ_CHECK_CUDA(cudaStreamEndCapture(w.stream_, &captured));
            const cudaError_t code = cudaGraphInstantiate(&executable_, captured, 0);
            cudaGraphDestroy(captured);
            CUVQ_CHECK_CUDA(code);
            CUVQ_CHECK_CUDA(cudaGraphUpload(executable_, w.stream_));
        }
        graph(const graph&) = delete;
        graph& operator=(const graph&) = delete;
        ~graph() { cudaGraphExecDestroy(executable_); }
        operator cudaGraphExec_t() const { return executable_; }

    private:
        cudaGraphExec_t executable_ = nullptr;
    };

    void begin() { CUVQ_CHECK_CUDA(cudaEventRecord(start_, stream_)); }
    double end() {
        CUVQ_CHECK_CUDA(cudaEventRecord(stop_, stream_));
        CUVQ_CHECK_CUDA(cudaEventSynchronize(stop_));
        float ms = 0;
        CUVQ_CHECK_CUDA(cudaEventElapsedTime(&ms, start_, stop_));
        return std::max(1e-3, 1e3 * static_cast<double>(ms));
    }

    double seconds_;
    std::size_t fewest_;
    cudaStream_t stream_ = nullptr;
    cudaEvent_t start_ = nullptr, stop_ = nullptr;
};

}  // namespace cuvq::bench
