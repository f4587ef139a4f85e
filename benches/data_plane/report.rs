//! Medians, ratios and goals: a table, and JSON.

use crate::contestants::Sample;
use crate::cost::Cost;

pub const CONTESTANTS: [&str; 4] = ["thinlun", "vhost-device-scsi", "fio psync", "fio io_uring"];

/// One load: the medians of each contestant that was there.
pub struct Row {
    pub title: String,
    pub medians: [Option<Sample>; 4],
}

impl Row {
    pub fn new(title: String, samples: [Vec<Sample>; 4]) -> Self {
        Row { title, medians: samples.map(|samples| median(&samples)) }
    }

    /// Our rate to that of another.
    pub fn ratio(&self, other: usize) -> Option<f64> {
        Some(self.medians[0]?.rate / self.medians[other]?.rate)
    }
}

fn median(samples: &[Sample]) -> Option<Sample> {
    let of = |part: fn(&Sample) -> f64| {
        let mut values: Vec<f64> = samples.iter().map(part).collect();
        values.sort_by(f64::total_cmp);
        values.get(values.len() / 2).copied()
    };
    Some(Sample { rate: of(|s| s.rate)?, p50: of(|s| s.p50)?, p99: of(|s| s.p99)? })
}

/// Rates of a queue, in transfers a second: with another in the same daemon, in another daemon, and alone.
pub struct Sharing {
    pub load: &'static str,
    pub together: f64,
    pub apart: f64,
    pub alone: f64,
}

#[derive(Default)]
pub struct Report {
    pub rows: Vec<Row>,
    pub costs: Vec<Cost>,
    pub sharing: Vec<Sharing>,
    /// Milliseconds from a process's start to its first read.
    pub start: Option<f64>,
}

impl Report {
    /// Adds a row and shows it at once.
    pub fn add(&mut self, row: Row) {
        if self.rows.is_empty() {
            println!(
                "{:<42} {:>9} {:>9} {:>9} {:>9}  {:>6} {:>6} {:>6}  {:>9}",
                "thousands of transfers a second",
                "thinlun",
                "v-d-scsi",
                "psync",
                "io_uring",
                "/v-d-s",
                "/psync",
                "/uring",
                "p50 (fio)"
            );
        }
        let rate = |n: usize| row.medians[n].map_or("-".into(), |s| format!("{:.1}", s.rate / 1e3));
        let ratio = |n: usize| row.ratio(n).map_or("-".into(), |r| format!("{r:.2}"));
        let p50 = |n: usize| row.medians[n].map_or("-".into(), |s| format!("{:.0}", s.p50));
        println!(
            "{:<42} {:>9} {:>9} {:>9} {:>9}  {:>6} {:>6} {:>6}  {:>5} ({})",
            row.title,
            rate(0),
            rate(1),
            rate(2),
            rate(3),
            ratio(1),
            ratio(2),
            ratio(3),
            p50(0),
            p50(3)
        );
        self.rows.push(row);
    }

    /// What a load has to reach, and whether it has.
    pub fn print_goals(&self) {
        for Sharing { load, together, apart, alone } in &self.sharing {
            println!(
                "tmpfs, {load} 4k, depth 32, two queues on two files: {:.0} thousand a queue; to that of two \
                 daemons {:.2}; to that of one queue alone {:.2}",
                together / 1e3,
                together / apart,
                together / alone
            );
        }
        for cost in &self.costs {
            println!("{cost}");
        }
        if let Some(start) = self.start {
            println!("from start to a served first read: {start:.1} ms (goal: 50)");
        }
        for row in &self.rows {
            for (what, reached, goal) in goals(row) {
                let verdict = if reached >= goal { "reached" } else { "MISSED" };
                println!("{verdict:<8} {}: {what} {reached:.2}, goal {goal}", row.title);
            }
        }
    }

    pub fn json(&self) -> String {
        let row = |row: &Row| {
            let parts = CONTESTANTS.iter().zip(&row.medians).filter_map(|(name, sample)| {
                let s = (*sample)?;
                Some(format!(
                    "\"{name}\": {{\"rate\": {:.0}, \"p50_us\": {:.2}, \"p99_us\": {:.2}}}",
                    s.rate, s.p50, s.p99
                ))
            });
            let parts: Vec<String> = parts.collect();
            format!("  {{\"load\": \"{}\", {}}}", row.title, parts.join(", "))
        };
        let rows: Vec<String> = self.rows.iter().map(row).collect();
        let sharing: Vec<String> = self
            .sharing
            .iter()
            .map(|Sharing { load, together, apart, alone }| {
                format!(
                    "  {{\"load\": \"{load}\", \"together\": {together:.0}, \"apart\": {apart:.0}, \
                     \"alone\": {alone:.0}}}"
                )
            })
            .collect();
        let costs: Vec<String> = self.costs.iter().map(Cost::json).collect();
        format!(
            "{{\"loads\": [\n{}\n],\n\"sharing\": [\n{}\n],\n\"costs\": [\n{}\n],\n\"start_ms\": {}}}\n",
            rows.join(",\n"),
            sharing.join(",\n"),
            costs.join(",\n"),
            self.start.map_or("null".to_owned(), |start| format!("{start:.1}"))
        )
    }
}

/// What is asked of a load: what, what it came to, and what it should at least.
fn goals(row: &Row) -> Vec<(&'static str, f64, f64)> {
    let mut goals = Vec::new();
    let has = |text: &str| row.title.contains(text);
    let mut ratio = |what, other, goal| {
        goals.extend(row.ratio(other).map(|ratio| (what, ratio, goal)));
    };
    if has("queues") {
        return goals;
    }
    if has("128k") && has("depth 8") && !has("rand") {
        let best = if row.ratio(2) < row.ratio(3) { 2 } else { 3 };
        ratio("to fio's best engine", best, 0.9);
    } else if has("direct") && has("depth 32") {
        ratio("to fio io_uring", 3, 0.95);
    } else if has("direct") && has("depth 1") {
        if let (Some(ours), Some(fio)) = (row.medians[0], row.medians[3]) {
            goals.push(("fio's p50 and 15 us, to ours", (fio.p50 + 15.0) / ours.p50, 1.0));
        }
    } else if has("depth 32") {
        ratio("to fio psync", 2, 0.85);
        ratio("to vhost-device-scsi", 1, 1.7);
    } else if has("depth 1") {
        ratio("to vhost-device-scsi", 1, 1.0);
    }
    goals
}
