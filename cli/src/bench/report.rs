//! One page with everything, for a browser: no script, no network, light and dark, wide and narrow. The plots are drawn
//! here: two of each shape, throughput and latency over time.

use std::fmt::Write;

use super::figures::Point;
use super::output::{Measurement, Report};
use crate::size;

/// A plot, in its own units; the page scales it.
const WIDTH: f64 = 640.0;
const HEIGHT: f64 = 260.0;
const LEFT: f64 = 68.0;
const RIGHT: f64 = 10.0;
const TOP: f64 = 12.0;
const BOTTOM: f64 = 34.0;
/// Targets that have a colour of their own; further ones begin again.
const COLOURS: usize = 6;
/// From this size of request on throughput is told in bytes.
const IN_BYTES: u64 = 64 << 10;

const STYLE: &str = "
:root { color-scheme: light dark; --ground: #fff; --text: #1c2024; --faint: #667079; --line: #dfe3e7; --card: #f7f8fa;
  --c0: #0b62c4; --c1: #c2410c; --c2: #15803d; --c3: #9333ea; --c4: #b45309; --c5: #0e7490; --bad: #b91c1c }
@media (prefers-color-scheme: dark) {
  :root { --ground: #121417; --text: #e6e9ec; --faint: #98a2ac; --line: #2c3238; --card: #1a1e22;
    --c0: #6cb0ff; --c1: #ff9966; --c2: #6fd08c; --c3: #c99bff; --c4: #e9b949; --c5: #5fd3e6; --bad: #ff8080 } }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 76rem; padding: 1.2rem; background: var(--ground); color: var(--text);
  font: 15px/1.5 system-ui, sans-serif }
h1 { font-size: 1.5rem; margin: 0 0 .2rem } h2 { font-size: 1.1rem; margin: 0 } p { margin: .3rem 0 }
.faint { color: var(--faint) } .bad { color: var(--bad) }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem; margin: 1rem 0 } dt { color: var(--faint) }
dd { margin: 0; overflow-wrap: anywhere }
.wide { overflow-x: auto; margin: 1rem 0 } table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .25rem .7rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line) }
th { color: var(--faint); font-weight: 600 } th.left, td.left { text-align: left }
section { background: var(--card); border: 1px solid var(--line); border-radius: .6rem; padding: 1rem; margin: 1rem 0 }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 1rem;
  margin-top: .6rem }
figure { margin: 0 } figcaption { color: var(--faint); font-size: .85rem } svg { width: 100%; height: auto; display: block }
svg text { fill: var(--faint); font: 15px system-ui, sans-serif } .grid { stroke: var(--line) }
.round { stroke: var(--faint); stroke-dasharray: 2 4; opacity: .6 } path { fill: none; stroke-width: 1.7 }
.p99 { stroke-dasharray: 6 3 } .max { stroke-dasharray: 1.5 3 }
.s0 { stroke: var(--c0) } .s1 { stroke: var(--c1) } .s2 { stroke: var(--c2) } .s3 { stroke: var(--c3) }
.s4 { stroke: var(--c4) } .s5 { stroke: var(--c5) }
.key { display: inline-block; margin-right: 1rem } .key svg { display: inline; width: 26px; height: 10px }
";

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

/// A day and a time, in UTC, of milliseconds since 1970.
fn date(unix_ms: u64) -> String {
    let (days, seconds) = (unix_ms / 86_400_000, unix_ms / 1000 % 86_400);
    // The civil calendar, with years that begin in March so that the leap day comes last.
    let shifted = days + 719_468;
    let (era, day) = (shifted / 146_097, shifted % 146_097);
    let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153;
    let day = day - (153 * month + 2) / 5 + 1;
    let (month, next) = if month < 10 { (month + 3, 0) } else { (month - 9, 1) };
    let year = era * 400 + year + next;
    format!("{year}-{month:02}-{day:02} {:02}:{:02} UTC", seconds / 3600, seconds / 60 % 60)
}

/// The page.
pub fn page(report: &Report) -> String {
    let mut out = String::new();
    let names: Vec<&str> = report.targets.iter().map(|target| target.name.as_str()).collect();
    let title = escape(&format!("{}: how fast", names.join(", ")));
    let _ = write!(
        out,
        "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n<title>{title}</title>\n\
         <style>{STYLE}</style>\n</head>\n<body>\n<h1>{title}</h1>\n\
         <p class=\"faint\">measured by md99 {} on {}, {}</p>\n",
        report.version,
        escape(&report.machine.host),
        date(report.began_unix_ms),
    );
    if report.interrupted {
        out.push_str("<p class=\"bad\">Interrupted: the figures are of what was measured until then.</p>\n");
    }
    about(&mut out, report);
    summary(&mut out, report);
    let mut shapes: Vec<&str> = Vec::new();
    for measurement in &report.measurements {
        if !shapes.contains(&measurement.shape.name.as_str()) {
            shapes.push(&measurement.shape.name);
        }
    }
    for shape in shapes {
        let of: Vec<&Measurement> = report.measurements.iter().filter(|m| m.shape.name == shape).collect();
        section(&mut out, report, &of);
    }
    out.push_str("</body>\n</html>\n");
    out
}

fn about(out: &mut String, report: &Report) {
    let machine = &report.machine;
    let round = match report.total {
        Some(total) => format!("until {} were asked for", size::show(total)),
        None => format!("{} s", report.seconds),
    };
    let filled = if report.filled { "written once before" } else { "not written before: reads may be of empty space" };
    let mut rows = vec![
        (
            "machine",
            format!("{}, {} processors, {} MiB", machine.processor, machine.processors, machine.memory_bytes >> 20),
        ),
        ("kernel", machine.kernel.clone()),
        ("load average", format!("{} before, {} after", machine.load_average, report.load_average_after)),
        (
            "rounds",
            format!(
                "{} of {round}, {} session{}",
                report.rounds,
                report.sessions,
                if report.sessions == 1 { "" } else { "s" }
            ),
        ),
        ("region", filled.into()),
    ];
    rows.extend(report.targets.iter().map(|target| {
        let (region, device) = (size::show(target.region_bytes), size::show(target.device_bytes));
        (target.name.as_str(), format!("{}: the first {region} of {device}", target.url))
    }));
    out.push_str("<dl>\n");
    for (what, value) in rows {
        let _ = writeln!(out, "<dt>{}</dt><dd>{}</dd>", escape(what), escape(&value));
    }
    out.push_str("</dl>\n");
}

fn summary(out: &mut String, report: &Report) {
    let several = report.targets.len() > 1;
    let pids = report.targets.iter().any(|target| !target.pids.is_empty());
    out.push_str("<div class=\"wide\"><table>\n<tr><th class=\"left\">shape</th>");
    if several {
        out.push_str("<th class=\"left\">target</th>");
    }
    for header in ["IOPS", "MB/s", "p50 µs", "p90", "p99", "p99.9", "max", "errors"] {
        let _ = write!(out, "<th>{header}</th>");
    }
    if pids {
        out.push_str("<th>CPU µs/IO</th><th>memory</th>");
    }
    out.push_str(if several { "<th>ratio</th></tr>\n" } else { "</tr>\n" });
    for measurement in &report.measurements {
        let m = measurement.median();
        let _ = write!(out, "<tr><td class=\"left\">{}</td>", escape(&measurement.shape.name));
        if several {
            let _ = write!(out, "<td class=\"left\">{}</td>", escape(&measurement.target));
        }
        let _ = write!(out, "<td>{:.0}</td><td>{:.1}</td>", m.iops, m.mb_per_s);
        for us in [m.p50_us, m.p90_us, m.p99_us, m.p999_us, m.max_us] {
            let _ = write!(out, "<td>{us:.0}</td>");
        }
        let errors = measurement.errors();
        let _ = write!(out, "<td{}>{errors}</td>", if errors > 0 { " class=\"bad\"" } else { "" });
        if pids {
            let cpu = m.target_us_per_io.map_or("-".into(), |us| format!("{us:.1}"));
            let memory = m.target_resident_bytes.map_or("-".into(), |bytes| size::show((bytes as u64) >> 20 << 20));
            let _ = write!(out, "<td>{cpu}</td><td>{memory}</td>");
        }
        if several {
            let _ = write!(out, "<td>{}</td>", measurement.ratio.map_or("-".into(), |ratio| format!("{ratio:.2}")));
        }
        out.push_str("</tr>\n");
    }
    out.push_str("</table></div>\n");
}

fn colour(report: &Report, target: &str) -> usize {
    report.targets.iter().position(|other| other.name == target).unwrap_or(0) % COLOURS
}

fn section(out: &mut String, report: &Report, of: &[&Measurement]) {
    let Some(first) = of.first() else { return };
    let shape = &first.shape;
    let _ = write!(
        out,
        "<section>\n<h2>{}</h2>\n<p class=\"faint\">{}</p>\n<p>",
        escape(&shape.name),
        escape(&shape.words())
    );
    let sample = |class: &str| {
        format!("<svg viewBox=\"0 0 26 10\" aria-hidden=\"true\"><path class=\"{class}\" d=\"M0 5H26\"/></svg>")
    };
    for measurement in of {
        let class = format!("s{}", colour(report, &measurement.target));
        let _ = write!(out, "<span class=\"key\">{} {}</span>", sample(&class), escape(&measurement.target));
    }
    out.push_str("</p>\n<div class=\"plots\">\n");
    let bytes = shape.block_size >= IN_BYTES;
    let (unit, rate): (&str, fn(&Point) -> Option<f64>) = match bytes {
        true => ("MB/s", |point| Some(point.mb_per_s)),
        false => ("IOPS", |point| Some(point.iops)),
    };
    let class = |measurement: &Measurement| format!("s{}", colour(report, &measurement.target));
    let lines: Vec<Line<'_>> = of.iter().map(|m| Line { of: m, class: class(m), get: rate }).collect();
    let _ = write!(
        out,
        "<figure>\n{}<figcaption>{unit} over time</figcaption>\n</figure>\n",
        plot(&format!("{unit} of {} over time", shape.name), &lines, &Scale::linear(&lines))
    );
    type Latency = (&'static str, fn(&Point) -> Option<f64>);
    let kinds: [Latency; 3] = [("p50", |p| p.p50_us), ("p99", |p| p.p99_us), ("max", |p| p.max_us)];
    let each = kinds.iter().flat_map(|(kind, get)| {
        of.iter().map(move |m| Line { of: m, class: format!("s{} {kind}", colour(report, &m.target)), get: *get })
    });
    let lines: Vec<Line<'_>> = each.collect();
    let keys = kinds.map(|(kind, _)| format!("<span class=\"key\">{} {kind}</span>", sample(&format!("s0 {kind}"))));
    let _ = write!(
        out,
        "<figure>\n{}<figcaption>latency over time: {}</figcaption>\n</figure>\n</div>\n",
        plot(&format!("latency of {} over time", shape.name), &lines, &Scale::logarithmic(&lines)),
        keys.concat(),
    );
    for measurement in of {
        if let Some(complaint) = measurement.complaint() {
            let _ = writeln!(out, "<p class=\"bad\">{}</p>", escape(&complaint));
        }
    }
    out.push_str("</section>\n");
}

struct Line<'a> {
    of: &'a Measurement,
    class: String,
    get: fn(&Point) -> Option<f64>,
}

impl Line<'_> {
    fn values(&self) -> impl Iterator<Item = f64> {
        self.of.rounds.iter().flat_map(|round| &round.series).filter_map(self.get)
    }
}

/// The vertical axis.
struct Scale {
    from: f64,
    to: f64,
    logarithmic: bool,
    ticks: Vec<(f64, String)>,
}

impl Scale {
    fn linear(lines: &[Line<'_>]) -> Self {
        let highest = lines.iter().flat_map(Line::values).fold(0.0, f64::max).max(1.0);
        let rough = highest / 4.0;
        let power = 10f64.powf(rough.log10().floor());
        let step = [1.0, 2.0, 2.5, 5.0, 10.0].iter().map(|m| m * power).find(|step| *step >= rough).unwrap_or(rough);
        let count = (highest / step).ceil() as u32;
        let ticks = (0..=count).map(|n| (f64::from(n) * step, short(f64::from(n) * step))).collect();
        Self { from: 0.0, to: f64::from(count) * step, logarithmic: false, ticks }
    }

    fn logarithmic(lines: &[Line<'_>]) -> Self {
        let there = || lines.iter().flat_map(Line::values).filter(|us| *us > 0.0);
        let (lowest, highest) = (there().fold(f64::INFINITY, f64::min), there().fold(1.0, f64::max));
        let from = 10f64.powf(lowest.min(highest).log10().floor());
        let to = 10f64.powf(highest.log10().ceil()).max(from * 10.0);
        let decades = (to / from).log10().round() as i32;
        let steps: &[f64] = if decades <= 2 { &[1.0, 2.0, 5.0] } else { &[1.0] };
        let ticks = (0..=decades).flat_map(|n| steps.iter().map(move |step| step * from * 10f64.powi(n)));
        let ticks = ticks.filter(|us| *us <= to * 1.001).map(|us| (us, time(us))).collect();
        Self { from, to, logarithmic: true, ticks }
    }

    fn at(&self, value: f64) -> f64 {
        let part = match self.logarithmic {
            true => (value.max(self.from) / self.from).log10() / (self.to / self.from).log10(),
            false => value / self.to,
        };
        HEIGHT - BOTTOM - part.clamp(0.0, 1.0) * (HEIGHT - TOP - BOTTOM)
    }
}

/// A number that fits beside an axis.
fn short(value: f64) -> String {
    match value {
        v if v >= 1e6 => format!("{}M", round(v / 1e6)),
        v if v >= 1e4 => format!("{}k", round(v / 1e3)),
        v => round(v),
    }
}

fn round(value: f64) -> String {
    let text = format!("{value:.2}");
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

/// Microseconds as people say them.
fn time(us: f64) -> String {
    match us {
        us if us >= 1e6 => format!("{} s", round(us / 1e6)),
        us if us >= 1e3 => format!("{} ms", round(us / 1e3)),
        us => format!("{} µs", round(us)),
    }
}

fn plot(title: &str, lines: &[Line<'_>], scale: &Scale) -> String {
    // Rounds stand one after the other; each is as wide as its longest on any target.
    let rounds = lines.iter().map(|line| line.of.rounds.len()).max().unwrap_or(0);
    let lengths: Vec<f64> = (0..rounds)
        .map(|n| lines.iter().filter_map(|line| line.of.rounds.get(n)).map(|round| round.seconds).fold(0.0, f64::max))
        .collect();
    let whole = lengths.iter().sum::<f64>().max(1e-3);
    let x = |seconds: f64| LEFT + (seconds / whole).clamp(0.0, 1.0) * (WIDTH - LEFT - RIGHT);
    let mut out = String::new();
    let _ = writeln!(
        out,
        "<svg viewBox=\"0 0 {WIDTH} {HEIGHT}\" role=\"img\" aria-label=\"{0}\"><title>{0}</title>",
        escape(title)
    );
    for (value, label) in &scale.ticks {
        let y = scale.at(*value);
        let _ = writeln!(
            out,
            "<line class=\"grid\" x1=\"{LEFT}\" x2=\"{}\" y1=\"{y:.1}\" y2=\"{y:.1}\"/>\
             <text x=\"{}\" y=\"{:.1}\" text-anchor=\"end\">{label}</text>",
            WIDTH - RIGHT,
            LEFT - 6.0,
            y + 5.0
        );
    }
    let mut starts = Vec::new();
    let mut at = 0.0;
    for length in &lengths {
        starts.push(at);
        if at > 0.0 {
            let x = x(at);
            let (top, bottom) = (TOP, HEIGHT - BOTTOM);
            let _ = writeln!(out, "<line class=\"round\" x1=\"{x:.1}\" x2=\"{x:.1}\" y1=\"{top}\" y2=\"{bottom}\"/>");
        }
        at += length;
    }
    for (seconds, anchor) in [(0.0, "start"), (whole / 2.0, "middle"), (whole, "end")] {
        let y = HEIGHT - 10.0;
        let label = time(seconds * 1e6);
        let label = if seconds == 0.0 { "0 s" } else { &label };
        let _ = writeln!(out, "<text x=\"{:.1}\" y=\"{y}\" text-anchor=\"{anchor}\">{label}</text>", x(seconds));
    }
    for line in lines {
        let mut path = String::new();
        for (round, start) in line.of.rounds.iter().zip(&starts) {
            // A gap where nothing was answered, and between rounds.
            let mut pen = 'M';
            for point in &round.series {
                let Some(value) = (line.get)(point) else {
                    pen = 'M';
                    continue;
                };
                let middle = start + point.at_s + point.seconds / 2.0;
                let _ = write!(path, "{pen}{:.1} {:.1}", x(middle), scale.at(value));
                // A point by itself is a short line.
                let alone = round.series.len() == 1;
                if alone {
                    let _ = write!(path, "h3");
                }
                pen = 'L';
            }
        }
        let _ = writeln!(out, "<path class=\"{}\" d=\"{path}\"/>", line.class);
    }
    out.push_str("</svg>\n");
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_of_the_civil_calendar() {
        for (unix_ms, text) in [
            (0, "1970-01-01 00:00 UTC"),
            (951_782_400_000, "2000-02-29 00:00 UTC"),
            (1_795_204_740_000, "2026-11-20 19:59 UTC"),
        ] {
            assert_eq!(date(unix_ms), text);
        }
    }

    #[test]
    fn axes_have_round_numbers() {
        assert_eq!([short(25_000.0), short(1500.0), short(2.5e6), short(0.0)], ["25k", "1500", "2.5M", "0"]);
        assert_eq!([time(50.0), time(2000.0), time(1.5e6)], ["50 µs", "2 ms", "1.5 s"]);
    }
}
