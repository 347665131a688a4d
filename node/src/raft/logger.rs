//! slog, which raft-rs speaks, passed on to tracing.

use slog::{Drain, KV, Level, Logger, OwnedKVList, Record, o};

struct Bridge;

impl Drain for Bridge {
    type Ok = ();
    type Err = slog::Never;

    fn log(&self, record: &Record<'_>, context: &OwnedKVList) -> Result<(), slog::Never> {
        // raft-rs tells of every vote at level info: for us that is detail.
        let level = match record.level() {
            Level::Critical | Level::Error => tracing::Level::ERROR,
            Level::Warning => tracing::Level::DEBUG,
            Level::Info => tracing::Level::DEBUG,
            Level::Debug | Level::Trace => tracing::Level::TRACE,
        };
        if level > tracing::level_filters::LevelFilter::current() {
            return Ok(());
        }
        let mut pairs = Pairs(String::new());
        let _ = record.kv().serialize(record, &mut pairs);
        let _ = context.serialize(record, &mut pairs);
        let (text, pairs) = (record.msg(), pairs.0);
        match level {
            tracing::Level::ERROR => tracing::error!(target: "raft", "{text}{pairs}"),
            tracing::Level::DEBUG => tracing::debug!(target: "raft", "{text}{pairs}"),
            _ => tracing::trace!(target: "raft", "{text}{pairs}"),
        }
        Ok(())
    }
}

struct Pairs(String);

impl slog::Serializer for Pairs {
    fn emit_arguments(&mut self, key: slog::Key, value: &std::fmt::Arguments<'_>) -> slog::Result {
        use std::fmt::Write;
        write!(self.0, ", {key}: {value}")?;
        Ok(())
    }
}

/// A slog logger that writes to tracing.
pub fn logger() -> Logger {
    Logger::root(Bridge, o!())
}
