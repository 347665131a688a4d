//! What is measured: every latency in a histogram, interval by interval, and the figures made of that.

use std::time::{Duration, Instant};

use hdrhistogram::Histogram;
use serde::Serialize;

/// The longest latency that is told apart from longer ones.
const LONGEST: Duration = Duration::from_secs(1000);
/// Significant digits of a latency.
const DIGITS: u8 = 3;

/// One interval of a round.
#[derive(Clone, Debug, Serialize)]
pub struct Point {
    /// When it began, in seconds since the round did.
    pub at_s: f64,
    /// How long it was.
    pub seconds: f64,
    /// Requests answered in it, each second.
    pub iops: f64,
    /// Millions of bytes, each second.
    pub mb_per_s: f64,
    /// Latencies of what was answered in it, in microseconds; absent where nothing was.
    pub p50_us: Option<f64>,
    /// 99 of 100 were not longer.
    pub p99_us: Option<f64>,
    /// 999 of 1000 were not longer.
    pub p999_us: Option<f64>,
    /// The longest.
    pub max_us: Option<f64>,
}

/// What one round came to, or several.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Figures {
    /// Requests answered, each second.
    pub iops: f64,
    /// Millions of bytes, each second.
    pub mb_per_s: f64,
    /// Latencies in microseconds.
    pub mean_us: f64,
    /// Half were not longer.
    pub p50_us: f64,
    /// 90 of 100.
    pub p90_us: f64,
    /// 99 of 100.
    pub p99_us: f64,
    /// 999 of 1000.
    pub p999_us: f64,
    /// The longest.
    pub max_us: f64,
    /// Processor time of the load itself, in microseconds a request.
    pub load_us_per_io: f64,
    /// Processor time of the target's processes, in microseconds a request.
    pub target_us_per_io: Option<f64>,
    /// The same in seconds a GiB.
    pub target_s_per_gib: Option<f64>,
    /// What the target's processes held in memory afterwards.
    pub target_resident_bytes: Option<f64>,
}

impl Figures {
    /// The median of each figure.
    pub fn median(of: &[&Figures]) -> Figures {
        let each = |get: &dyn Fn(&Figures) -> f64| median(of.iter().map(|figures| get(figures)).collect());
        let some = |get: &dyn Fn(&Figures) -> Option<f64>| {
            let there: Vec<f64> = of.iter().filter_map(|figures| get(figures)).collect();
            (!there.is_empty()).then(|| median(there))
        };
        Figures {
            iops: each(&|f| f.iops),
            mb_per_s: each(&|f| f.mb_per_s),
            mean_us: each(&|f| f.mean_us),
            p50_us: each(&|f| f.p50_us),
            p90_us: each(&|f| f.p90_us),
            p99_us: each(&|f| f.p99_us),
            p999_us: each(&|f| f.p999_us),
            max_us: each(&|f| f.max_us),
            load_us_per_io: each(&|f| f.load_us_per_io),
            target_us_per_io: some(&|f| f.target_us_per_io),
            target_s_per_gib: some(&|f| f.target_s_per_gib),
            target_resident_bytes: some(&|f| f.target_resident_bytes),
        }
    }
}

/// The median; of an even number the mean of the middle two, of none 0.
pub fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    match values.len() {
        0 => 0.0,
        n if n % 2 == 1 => values[n / 2],
        n => (values[n / 2 - 1] + values[n / 2]) / 2.0,
    }
}

/// What was counted in one round.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Counts {
    /// Requests answered well.
    pub requests: u64,
    /// Those of them that read.
    pub reads: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Requests that failed.
    pub errors: u64,
    /// The first of them.
    pub first_error: Option<String>,
    /// Answers that asked for the same again: unit attentions, busy.
    pub again: u64,
    /// Requests that were never answered.
    pub unanswered: u64,
}

/// Records one round, for all threads of its load.
pub struct Recorder {
    began: Instant,
    last: Instant,
    interval: Duration,
    current: Histogram<u64>,
    total: Histogram<u64>,
    series: Vec<Point>,
    bytes_before: u64,
    counts: Counts,
}

impl Recorder {
    /// Begins now.
    pub fn new(interval: Duration) -> Self {
        let histogram = || {
            let longest = LONGEST.as_nanos() as u64;
            Histogram::new_with_bounds(1, longest, DIGITS).expect("bounds that a histogram can have")
        };
        let began = Instant::now();
        Self {
            began,
            last: began,
            interval,
            current: histogram(),
            total: histogram(),
            series: Vec::new(),
            bytes_before: 0,
            counts: Counts::default(),
        }
    }

    /// A request was answered well.
    pub fn answered(&mut self, now: Instant, took: Duration, bytes: u64, read: bool) {
        self.roll(now);
        self.last = self.last.max(now);
        self.current.saturating_record(took.as_nanos() as u64);
        self.counts.requests += 1;
        self.counts.reads += u64::from(read);
        self.counts.bytes += bytes;
    }

    /// A request failed.
    pub fn failed(&mut self, error: &dyn std::fmt::Display) {
        self.counts.errors += 1;
        self.counts.first_error.get_or_insert_with(|| error.to_string());
    }

    /// The target asked for the same again.
    pub fn again(&mut self) {
        self.counts.again += 1;
    }

    /// So many requests are not waited for any longer.
    pub fn gave_up(&mut self, requests: u64) {
        self.counts.unanswered += requests;
        self.counts.first_error.get_or_insert_with(|| format!("{requests} requests were never answered"));
    }

    /// What was counted until now.
    pub fn counts(&self) -> &Counts {
        &self.counts
    }

    fn roll(&mut self, now: Instant) {
        while now >= self.began + self.interval * (self.series.len() as u32 + 1) {
            self.close(self.interval.as_secs_f64());
        }
    }

    fn close(&mut self, seconds: f64) {
        let at =
            |quantile: f64| (!self.current.is_empty()).then(|| self.current.value_at_quantile(quantile) as f64 / 1e3);
        let bytes = self.counts.bytes - self.bytes_before;
        self.bytes_before = self.counts.bytes;
        let point = Point {
            at_s: self.interval.as_secs_f64() * self.series.len() as f64,
            seconds,
            iops: self.current.len() as f64 / seconds,
            mb_per_s: bytes as f64 / 1e6 / seconds,
            p50_us: at(0.5),
            p99_us: at(0.99),
            p999_us: at(0.999),
            max_us: (!self.current.is_empty()).then(|| self.current.max() as f64 / 1e3),
        };
        self.series.push(point);
        self.total.add(&self.current).expect("both have the same bounds");
        self.current.reset();
    }

    /// Ends the round: its figures without processor times, its counts and its intervals. It lasted until its last
    /// answer, or until `ended` if there is something that was not answered.
    pub fn finish(mut self, ended: Instant) -> (Figures, Counts, Vec<Point>, f64) {
        let until = if self.counts.unanswered > 0 || self.counts.requests == 0 { ended } else { self.last };
        self.roll(until);
        let rest = (until - self.began).as_secs_f64() - self.interval.as_secs_f64() * self.series.len() as f64;
        // A sliver of an interval has no rate worth drawing.
        if rest >= self.interval.as_secs_f64() / 4.0 || self.series.is_empty() {
            self.close(rest.max(1e-6));
        } else {
            self.total.add(&self.current).expect("both have the same bounds");
        }
        let seconds = (until - self.began).as_secs_f64().max(1e-6);
        let at = |quantile: f64| self.total.value_at_quantile(quantile) as f64 / 1e3;
        let empty = self.total.is_empty();
        let figures = Figures {
            iops: self.counts.requests as f64 / seconds,
            mb_per_s: self.counts.bytes as f64 / 1e6 / seconds,
            mean_us: if empty { 0.0 } else { self.total.mean() / 1e3 },
            p50_us: at(0.5),
            p90_us: at(0.9),
            p99_us: at(0.99),
            p999_us: at(0.999),
            max_us: self.total.max() as f64 / 1e3,
            ..Figures::default()
        };
        (figures, self.counts, self.series, seconds)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_round_is_recorded_interval_by_interval() {
        let mut recorder = Recorder::new(Duration::from_millis(100));
        let began = recorder.began;
        for ms in 0..250u64 {
            // The second interval is silent.
            if !(100..200).contains(&ms) {
                let took = Duration::from_micros(if ms == 210 { 9000 } else { 100 });
                recorder.answered(began + Duration::from_millis(ms), took, 4096, ms % 2 == 0);
            }
        }
        let (figures, counts, series, seconds) = recorder.finish(Instant::now());
        assert_eq!((counts.requests, counts.reads, counts.bytes), (150, 75, 150 * 4096));
        assert_eq!(series.len(), 3);
        assert_eq!((series[0].iops, series[1].iops, series[1].p50_us), (1000.0, 0.0, None));
        assert!((series[2].seconds - 0.049).abs() < 1e-9, "{:?}", series[2]);
        assert!((seconds - 0.249).abs() < 1e-9);
        assert!((figures.p50_us - 100.0).abs() < 0.2 && (figures.max_us - 9000.0).abs() < 10.0, "{figures:?}");
        assert!((figures.p999_us - 9000.0).abs() < 10.0 && figures.p90_us < 101.0);
    }

    #[test]
    fn the_median_of_rounds_is_taken_figure_by_figure() {
        let round = |iops, p50_us, cpu| Figures { iops, p50_us, target_us_per_io: cpu, ..Figures::default() };
        let rounds = [round(1.0, 30.0, None), round(3.0, 10.0, Some(4.0)), round(2.0, 20.0, Some(6.0))];
        let median = Figures::median(&rounds.iter().collect::<Vec<_>>());
        assert_eq!((median.iops, median.p50_us, median.target_us_per_io), (2.0, 20.0, Some(5.0)));
        assert_eq!((super::median(vec![]), super::median(vec![1.0, 9.0])), (0.0, 5.0));
    }
}
