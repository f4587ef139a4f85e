//! Medians, ratios and goals: a table, and JSON.

use std::fmt;

use crate::contestants::Sample;
use crate::cost::Cost;

pub const CONTESTANTS: [&str; 4] = ["thinlun", "vhost-device-scsi", "fio psync", "fio io_uring"];

/// One load: what each contestant gave in each round.
pub struct Row {
    pub title: String,
    rounds: Vec<[Option<Sample>; 4]>,
}

/// A median, and the quartiles beside it.
#[derive(Clone, Copy)]
struct Spread {
    lower: f64,
    median: f64,
    upper: f64,
}

impl Spread {
    fn of(values: impl Iterator<Item = f64>) -> Option<Self> {
        let mut values: Vec<f64> = values.collect();
        values.sort_by(f64::total_cmp);
        let at = |quarters| values.get(values.len() * quarters / 4).copied();
        Some(Spread { lower: at(1)?, median: at(2)?, upper: at(3)? })
    }
}

impl Row {
    pub fn new(title: String) -> Self {
        Row { title, rounds: Vec::new() }
    }

    pub fn add(&mut self, round: [Option<Sample>; 4]) {
        self.rounds.push(round);
    }

    /// The medians of a contestant that was there.
    pub fn median(&self, contestant: usize) -> Option<Sample> {
        let of = |part: fn(&Sample) -> f64| {
            let samples = self.rounds.iter().filter_map(|round| round[contestant].as_ref());
            Spread::of(samples.map(part)).map(|spread| spread.median)
        };
        Some(Sample { rate: of(|s| s.rate)?, p50: of(|s| s.p50)?, p99: of(|s| s.p99)? })
    }

    /// Something of ours and of another, round by round.
    fn beside(&self, other: usize, what: impl Fn(Sample, Sample) -> f64) -> Option<Spread> {
        let pairs = self.rounds.iter().filter_map(|round| Some((round[0]?, round[other]?)));
        Spread::of(pairs.map(|(ours, other)| what(ours, other)))
    }

    /// Our rate to that of another.
    fn ratio(&self, other: usize) -> Option<Spread> {
        self.beside(other, |ours, other| ours.rate / other.rate)
    }
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
    /// The table.
    pub fn print_rows(&self) {
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
        for row in &self.rows {
            let number = |number: Option<f64>, decimals: usize| {
                number.map_or("-".into(), |number| format!("{number:.decimals$}"))
            };
            let rate = |n: usize| number(row.median(n).map(|s| s.rate / 1e3), 1);
            let ratio = |n: usize| number(row.ratio(n).map(|ratio| ratio.median), 2);
            let p50 = |n: usize| number(row.median(n).map(|s| s.p50), 0);
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
        }
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
            for Goal { what, spread: Spread { lower, median, upper }, bound } in goals(row) {
                let verdict = if bound.holds(median) { "reached" } else { "MISSED" };
                println!(
                    "{verdict:<8} {}: {what} {median:.2} (half of the rounds {lower:.2} to {upper:.2}), goal {bound}",
                    row.title
                );
            }
        }
    }

    pub fn json(&self) -> String {
        let row = |row: &Row| {
            let parts = CONTESTANTS.iter().enumerate().filter_map(|(n, name)| {
                let Sample { rate, p50, p99 } = row.median(n)?;
                let Spread { lower, median, upper } = row.ratio(n)?;
                Some(format!(
                    "\"{name}\": {{\"rate\": {rate:.0}, \"p50_us\": {p50:.2}, \"p99_us\": {p99:.2}, \
                     \"ratio\": [{lower:.3}, {median:.3}, {upper:.3}]}}"
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

/// What is asked of a load, and what it came to.
struct Goal {
    what: &'static str,
    spread: Spread,
    bound: Bound,
}

enum Bound {
    AtLeast(f64),
    AtMost(f64),
}

impl Bound {
    fn holds(&self, value: f64) -> bool {
        match self {
            Bound::AtLeast(least) => value >= *least,
            Bound::AtMost(most) => value <= *most,
        }
    }
}

impl fmt::Display for Bound {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Bound::AtLeast(least) => write!(f, "at least {least}"),
            Bound::AtMost(most) => write!(f, "at most {most}"),
        }
    }
}

fn goals(row: &Row) -> Vec<Goal> {
    let mut goals = Vec::new();
    let mut goal = |what, spread: Option<Spread>, bound| {
        goals.extend(spread.map(|spread| Goal { what, spread, bound }));
    };
    let has = |text: &str| row.title.contains(text);
    if has("queues") {
        return goals;
    }
    if has("128k") && has("depth 8") && !has("rand") {
        let [psync, uring] = [2, 3].map(|fio| row.ratio(fio));
        let best = psync.into_iter().chain(uring).min_by(|a, b| a.median.total_cmp(&b.median));
        goal("to fio's best engine", best, Bound::AtLeast(0.9));
    } else if has("direct") && has("depth 32") {
        goal("to fio io_uring", row.ratio(3), Bound::AtLeast(0.95));
    } else if has("direct") && has("depth 1") {
        let above = row.beside(3, |ours, fio| ours.p50 - fio.p50);
        goal("us of p50 above fio's", above, Bound::AtMost(15.0));
    } else if has("depth 32") {
        goal("to fio psync", row.ratio(2), Bound::AtLeast(0.85));
        goal("to vhost-device-scsi", row.ratio(1), Bound::AtLeast(1.7));
    } else if has("depth 1") {
        goal("to vhost-device-scsi", row.ratio(1), Bound::AtLeast(1.0));
    }
    goals
}
