//! The day that a template may print.

use std::time::{SystemTime, UNIX_EPOCH};

/// A date, for templates that tell the model what day it is. It begins at midnight.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Date {
    /// The year.
    pub year: u16,
    /// The month, 1 to 12.
    pub month: u8,
    /// The day, 1 to 31.
    pub day: u8,
}

const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];
/// From the first of March of year 0 on, which was a Wednesday.
const WEEKDAYS: [&str; 7] = [
    "Wednesday",
    "Thursday",
    "Friday",
    "Saturday",
    "Sunday",
    "Monday",
    "Tuesday",
];
/// Days of 400 years.
const ERA: u64 = 146_097;
/// From the first of March of year 0 to the first of January 1970.
const EPOCH: u64 = 719_468;

impl Date {
    /// Today, in universal time.
    pub fn today() -> Self {
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        Self::from_days(now.map_or(0, |time| time.as_secs() / 86_400))
    }

    /// The date so many days after the first of January 1970, in the Gregorian calendar.
    fn from_days(days: u64) -> Self {
        // Years begin in March here, so that a leap day is the last day of one.
        let days = days + EPOCH;
        let (era, day) = (days / ERA, days % ERA);
        let year = (day - day / 1460 + day / 36_524 - day / (ERA - 1)) / 365;
        let day = day - (365 * year + year / 4 - year / 100);
        let month = (5 * day + 2) / 153;
        let first = (153 * month + 2) / 5;
        let january = month >= 10;
        Self {
            year: (400 * era + year + u64::from(january)) as u16,
            month: (if january { month - 9 } else { month + 3 }) as u8,
            day: (day - first + 1) as u8,
        }
    }

    /// Days since the first of March of year 0.
    fn days(self) -> u64 {
        let (year, month) = (u64::from(self.year), u64::from(self.month));
        let early = u64::from(month < 3);
        let (year, month) = ((year + 400) - early, month + 12 * early - 3);
        let days = 365 * year + year / 4 - year / 100 + year / 400;
        days + (153 * month + 2) / 5 + u64::from(self.day) - 1
    }

    /// As `strftime` of the C locale, at midnight in universal time.
    ///
    /// # Errors
    /// A message for an impossible month, and for what `strftime` does not know.
    pub(super) fn format(self, format: &str) -> Result<String, String> {
        let month = usize::from(self.month).checked_sub(1);
        let month = month
            .and_then(|month| MONTHS.get(month))
            .ok_or_else(|| format!("there is no month {}", self.month))?;
        let weekday = self.days() % 7;
        let name = WEEKDAYS[weekday as usize];
        let january = Self {
            month: 1,
            day: 1,
            ..self
        };
        let of_year = self.days() - january.days() + 1;
        let Self {
            year,
            month: m,
            day,
        } = self;
        let mut out = String::new();
        let mut chars = format.chars();
        while let Some(c) = chars.next() {
            if c != '%' {
                out.push(c);
                continue;
            }
            let mut kind = chars.next();
            // Without zeros in front.
            let bare = kind == Some('-');
            if bare {
                kind = chars.next();
            }
            let number = |n: u64, width: usize| match bare {
                true => n.to_string(),
                false => format!("{n:0width$}"),
            };
            match kind {
                Some('Y') => out.push_str(&year.to_string()),
                Some('C') => out.push_str(&number((year / 100).into(), 2)),
                Some('y') => out.push_str(&number((year % 100).into(), 2)),
                Some('m') => out.push_str(&number(m.into(), 2)),
                Some('d') => out.push_str(&number(day.into(), 2)),
                Some('e') if bare => out.push_str(&day.to_string()),
                Some('e') => out.push_str(&format!("{day:2}")),
                Some('j') => out.push_str(&number(of_year, 3)),
                Some('b' | 'h') => out.push_str(&month[..3]),
                Some('B') => out.push_str(month),
                Some('a') => out.push_str(&name[..3]),
                Some('A') => out.push_str(name),
                // Sunday is 0, or 7.
                Some('w') => out.push_str(&((weekday + 3) % 7).to_string()),
                Some('u') => out.push_str(&((weekday + 2) % 7 + 1).to_string()),
                Some('F') => out.push_str(&format!("{year}-{m:02}-{day:02}")),
                Some('D' | 'x') => out.push_str(&format!("{m:02}/{day:02}/{:02}", year % 100)),
                Some('H' | 'M' | 'S') => out.push_str(&number(0, 2)),
                Some('I') => out.push_str("12"),
                Some('p') => out.push_str("AM"),
                Some('f') => out.push_str("000000"),
                Some('T' | 'X') => out.push_str("00:00:00"),
                Some('R') => out.push_str("00:00"),
                Some('c') => {
                    let day = format!("{day:2}");
                    out.push_str(&format!(
                        "{} {} {day} 00:00:00 {year}",
                        &name[..3],
                        &month[..3]
                    ));
                }
                Some('Z') => out.push_str("UTC"),
                Some('z') => out.push_str("+0000"),
                Some('n') => out.push('\n'),
                Some('t') => out.push('\t'),
                Some('%') => out.push('%'),
                other => {
                    return Err(format!("strftime_now knows no %{}", other.unwrap_or(' ')));
                }
            }
        }
        Ok(out)
    }
}

#[cfg(test)]
mod tests {
    use super::Date;

    #[test]
    fn days_and_dates() {
        for (days, year, month, day) in [
            (0, 1970, 1, 1),
            (58, 1970, 2, 28),
            (59, 1970, 3, 1),
            (11_016, 2000, 2, 29),
            (11_017, 2000, 3, 1),
            (19_782, 2024, 2, 29),
            (20_088, 2024, 12, 31),
            (20_089, 2025, 1, 1),
            (47_540, 2100, 2, 28),
            (47_541, 2100, 3, 1),
        ] {
            assert_eq!(Date::from_days(days), Date { year, month, day }, "{days}");
        }
        assert!(Date::today().year >= 2024);
    }

    #[test]
    fn formats() {
        let date = Date {
            year: 2024,
            month: 7,
            day: 6,
        };
        for (format, expected) in [
            ("%A, %d %B %Y", "Saturday, 06 July 2024"),
            ("%a %-d %b %y", "Sat 6 Jul 24"),
            ("%F %T", "2024-07-06 00:00:00"),
            ("%H:%M:%S %I %p", "00:00:00 12 AM"),
            ("%j %w %u %e|%D", "188 6 6  6|07/06/24"),
            ("%c", "Sat Jul  6 00:00:00 2024"),
            ("%%%m", "%07"),
        ] {
            assert_eq!(date.format(format).as_deref(), Ok(expected), "{format}");
        }
        assert!(date.format("%Q").unwrap_err().contains("%Q"));
        assert!(date.format("%").is_err());
        let leap = Date {
            year: 2024,
            month: 12,
            day: 31,
        };
        assert_eq!(leap.format("%j %A").as_deref(), Ok("366 Tuesday"));
        assert!(Date { month: 13, ..date }.format("%d").is_err());
    }
}
