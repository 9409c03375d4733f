//! The result of a run, as one JSON object or as a table for people.
//!
//! Times are milliseconds in both. Throughput counts tokens of finished requests over the wall time from the first
//! request's start to the last terminal event.

use std::fmt::Write as _;
use std::time::Duration;

use serde::Serialize;

use super::histogram::Histogram;
use super::record::Record;

/// How the run was driven, for the report.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct Settings {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub model: Option<String>,
    /// Requests in flight at any time; absent with arrivals at a rate.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub concurrency: Option<u32>,
    /// Arrivals a second; absent with a fixed concurrency.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rate: Option<f64>,
    /// Arrivals beyond so many in flight are not sent; absent with a fixed concurrency.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_in_flight: Option<u32>,
    /// Requests asked for; absent where only time limits them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub requests: Option<u64>,
    /// Time after which none is started; absent where only their number limits them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub duration_seconds: Option<f64>,
    /// Requests sent before measuring began.
    pub warmup: u64,
    pub connections: u32,
    /// Such as `32` or `16..64`, or `text` for a given prompt.
    pub prompt_tokens: String,
    pub output_tokens: String,
    pub ignore_eos: bool,
    pub temperature: f32,
    /// Deadline of each request; absent where the gateway's default holds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub deadline_ms: Option<u64>,
    pub seed: u64,
}

/// Percentiles of one kind of duration, in milliseconds; all absent where nothing was recorded.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Percentiles {
    pub count: u64,
    pub mean: Option<f64>,
    pub p50: Option<f64>,
    pub p90: Option<f64>,
    pub p99: Option<f64>,
    pub max: Option<f64>,
}

impl Percentiles {
    fn of(histogram: &Histogram) -> Self {
        let ms = |time: Option<Duration>| time.map(milliseconds);
        Self {
            count: histogram.count(),
            mean: ms(histogram.mean()),
            p50: ms(histogram.percentile(50.0)),
            p90: ms(histogram.percentile(90.0)),
            p99: ms(histogram.percentile(99.0)),
            max: ms(histogram.max()),
        }
    }
}

/// Milliseconds with microsecond resolution, so that the report stays readable.
fn milliseconds(time: Duration) -> f64 {
    (time.as_secs_f64() * 1e6).round() / 1e3
}

/// The failures of one code.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ErrorCount {
    pub code: String,
    pub count: u64,
    /// What the first of them said.
    pub example: String,
}

/// One run. The field names are the keys of `bench --json`.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Report {
    pub settings: Settings,
    /// Whether the run was cut short by a signal.
    pub interrupted: bool,
    pub wall_seconds: f64,
    pub requests: u64,
    pub succeeded: u64,
    pub failed: u64,
    pub requests_per_second: f64,
    pub prompt_tokens: u64,
    pub output_tokens: u64,
    pub output_tokens_per_second: f64,
    /// Prompt and output together.
    pub total_tokens_per_second: f64,
    pub ttft_ms: Percentiles,
    pub inter_token_ms: Percentiles,
    pub e2e_ms: Percentiles,
    pub finish_reasons: std::collections::BTreeMap<&'static str, u64>,
    pub errors: Vec<ErrorCount>,
    pub reconnects: u64,
}

impl Report {
    /// Sums up a run that took `wall`.
    pub fn new(settings: Settings, record: &Record, wall: Duration, interrupted: bool) -> Self {
        let per_second = |count: u64| {
            let rate = count as f64 / wall.as_secs_f64().max(1e-9);
            (rate * 1e3).round() / 1e3
        };
        Self {
            settings,
            interrupted,
            wall_seconds: (wall.as_secs_f64() * 1e6).round() / 1e6,
            requests: record.ended(),
            succeeded: record.succeeded,
            failed: record.failed,
            requests_per_second: per_second(record.succeeded),
            prompt_tokens: record.prompt_tokens,
            output_tokens: record.output_tokens,
            output_tokens_per_second: per_second(record.output_tokens),
            total_tokens_per_second: per_second(record.prompt_tokens + record.output_tokens),
            ttft_ms: Percentiles::of(&record.ttft),
            inter_token_ms: Percentiles::of(&record.inter_token),
            e2e_ms: Percentiles::of(&record.e2e),
            finish_reasons: record.finish_reasons.clone(),
            errors: record
                .errors
                .iter()
                .map(|(code, failures)| ErrorCount {
                    code: code.clone(),
                    count: failures.count,
                    example: failures.example.clone(),
                })
                .collect(),
            reconnects: record.reconnects,
        }
    }

    /// The table for people.
    pub fn table(&self) -> String {
        let mut out = String::new();
        // Writing into a String cannot fail.
        let _ = self.write_table(&mut out);
        out
    }

    fn write_table(&self, out: &mut String) -> std::fmt::Result {
        let cut = if self.interrupted {
            " (interrupted)"
        } else {
            ""
        };
        writeln!(
            out,
            "requests        {} ok, {} failed, in {:.2} s{cut}",
            self.succeeded, self.failed, self.wall_seconds
        )?;
        writeln!(
            out,
            "tokens          {} prompt, {} output",
            self.prompt_tokens, self.output_tokens
        )?;
        writeln!(
            out,
            "throughput      {:.1} output tokens/s, {:.1} tokens/s in all, {:.2} requests/s",
            self.output_tokens_per_second, self.total_tokens_per_second, self.requests_per_second
        )?;
        let reasons: Vec<String> = self
            .finish_reasons
            .iter()
            .map(|(reason, count)| format!("{reason} {count}"))
            .collect();
        if !reasons.is_empty() {
            writeln!(out, "finish reasons  {}", reasons.join(", "))?;
        }
        if self.reconnects > 0 {
            writeln!(out, "reconnects      {}", self.reconnects)?;
        }
        writeln!(
            out,
            "\n{:<16}{:>10}{:>10}{:>10}{:>10}{:>10}",
            "milliseconds", "mean", "p50", "p90", "p99", "max"
        )?;
        for (name, row) in [
            ("first token", &self.ttft_ms),
            ("inter-token", &self.inter_token_ms),
            ("end to end", &self.e2e_ms),
        ] {
            write!(out, "{name:<16}")?;
            for value in [row.mean, row.p50, row.p90, row.p99, row.max] {
                let cell = value.map_or("-".to_owned(), |ms| format!("{ms:.2}"));
                write!(out, "{cell:>10}")?;
            }
            writeln!(out)?;
        }
        if self.failed > 0 {
            let not_all = format!("times and tokens leave {} failed out", self.failed);
            writeln!(out, "\nerrors ({not_all})")?;
        }
        for error in &self.errors {
            writeln!(out, "  {} × {}: {}", error.count, error.code, error.example)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use understudy_protocol::message::{FinishReason, Usage};

    use super::super::record::Course;
    use super::*;

    fn sample() -> Report {
        let ms = Duration::from_millis;
        let mut record = Record::default();
        let mut course = Course::new(ms(0));
        course.token(0, ms(20));
        course.token(1, ms(30));
        let usage = Usage {
            prompt_tokens: 4,
            completion_tokens: 2,
        };
        record.add(course.finished(FinishReason::Length, usage, ms(31)));
        record.add(Course::new(ms(0)).failed("overloaded", "too many streams: try again"));
        let settings = Settings {
            concurrency: Some(2),
            requests: Some(2),
            warmup: 1,
            temperature: 0.5,
            deadline_ms: Some(900),
            connections: 1,
            prompt_tokens: "4".to_owned(),
            output_tokens: "2".to_owned(),
            seed: 1,
            ..Settings::default()
        };
        Report::new(settings, &record, ms(500), false)
    }

    #[test]
    fn json_is_golden() {
        let json = serde_json::to_string(&sample()).expect("a report is JSON");
        assert_eq!(
            json,
            concat!(
                r#"{"settings":{"concurrency":2,"requests":2,"warmup":1,"connections":1,"prompt_tokens":"4","output_tokens":"2","#,
                r#""ignore_eos":false,"temperature":0.5,"deadline_ms":900,"seed":1},"#,
                r#""interrupted":false,"wall_seconds":0.5,"requests":2,"succeeded":1,"failed":1,"requests_per_second":2.0,"#,
                r#""prompt_tokens":4,"output_tokens":2,"output_tokens_per_second":4.0,"total_tokens_per_second":12.0,"#,
                r#""ttft_ms":{"count":1,"mean":20.0,"p50":20.0,"p90":20.0,"p99":20.0,"max":20.0},"#,
                r#""inter_token_ms":{"count":1,"mean":10.0,"p50":10.0,"p90":10.0,"p99":10.0,"max":10.0},"#,
                r#""e2e_ms":{"count":1,"mean":31.0,"p50":31.0,"p90":31.0,"p99":31.0,"max":31.0},"#,
                r#""finish_reasons":{"length":1},"#,
                r#""errors":[{"code":"overloaded","count":1,"example":"too many streams: try again"}],"reconnects":0}"#,
            )
        );
    }

    #[test]
    fn the_table_shows_everything_a_person_asks_for() {
        let table = sample().table();
        for part in [
            "1 ok, 1 failed",
            "4.0 output tokens/s",
            "first token          20.00     20.00",
            "errors (times and tokens leave 1 failed out)",
            "1 × overloaded: too many streams",
        ] {
            assert!(table.contains(part), "{part:?} is missing in\n{table}");
        }
    }

    #[test]
    fn an_empty_run_has_no_numbers_to_invent() {
        let report = Report::new(
            Settings::default(),
            &Record::default(),
            Duration::ZERO,
            true,
        );
        assert_eq!(report.ttft_ms.p50, None);
        assert_eq!(report.output_tokens_per_second, 0.0);
        assert!(report.table().contains("(interrupted)"));
    }
}
