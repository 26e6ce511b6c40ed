//! The Gregorian calendar, between seconds since 1970 and a date with a time of day.

const DAY: i64 = 86_400;
/// Days in 400 years, after which the calendar repeats.
const ERA: i64 = 146_097;
/// Days from the first of March of the year 0 to 1970.
const EPOCH: i64 = 719_468;

/// A date and a time of day, in UTC. As the guest may say anything, the numbers need not make sense.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Moment {
    pub year: i64,
    /// 1 to 12.
    pub month: u8,
    /// 1 to 31.
    pub day: u8,
    pub hour: u8,
    pub minute: u8,
    pub second: u8,
    /// 1 is Sunday.
    pub weekday: u8,
}

impl Moment {
    /// The moment `seconds` after the start of 1970; those outside the years 0 to 9999 become the nearest within.
    pub fn at(seconds: i64) -> Moment {
        let seconds = seconds.clamp(-62_167_219_200, 253_402_300_799);
        let days = seconds.div_euclid(DAY);
        let second = seconds.rem_euclid(DAY);
        // Years begin in March here, so that the leap day is the last of one.
        let day = days + EPOCH;
        let era = day.div_euclid(ERA);
        let day = day.rem_euclid(ERA);
        let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
        let day = day - (365 * year + year / 4 - year / 100);
        let month = (5 * day + 2) / 153;
        let day = day - (153 * month + 2) / 5 + 1;
        let month = if month < 10 { month + 3 } else { month - 9 };
        Moment {
            year: 400 * era + year + i64::from(month <= 2),
            month: small(month),
            day: small(day),
            hour: small(second / 3600),
            minute: small(second / 60 % 60),
            second: small(second % 60),
            // 1970 began on a Thursday.
            weekday: small((days + 4).rem_euclid(7) + 1),
        }
    }

    /// Seconds from the start of 1970 to this moment. Months count as at least 1 and at most 12; what is too large
    /// elsewhere runs over into the next unit.
    pub fn seconds(&self) -> i64 {
        let month = i64::from(self.month.clamp(1, 12));
        let year = self.year - i64::from(month <= 2);
        let month = (month + 9) % 12;
        let of_era = year.rem_euclid(400);
        let day = (153 * month + 2) / 5 + i64::from(self.day) - 1;
        let day = year.div_euclid(400) * ERA + of_era * 365 + of_era / 4 - of_era / 100 + day;
        let time = i64::from(self.hour) * 3600 + i64::from(self.minute) * 60 + i64::from(self.second);
        (day - EPOCH) * DAY + time
    }

    /// 26 of 2026.
    pub fn year_of_century(&self) -> u8 {
        small(self.year.rem_euclid(100))
    }

    /// 20 of 2026.
    pub fn century(&self) -> u8 {
        small(self.year.div_euclid(100))
    }
}

fn small(number: i64) -> u8 {
    u8::try_from(number).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn moment(year: i64, month: u8, day: u8, weekday: u8) -> Moment {
        Moment { year, month, day, weekday, hour: 0, minute: 0, second: 0 }
    }

    #[test]
    fn knows_the_days_where_calendars_go_wrong() {
        for (seconds, expected) in [
            (0, moment(1970, 1, 1, 5)),
            (951_782_400, moment(2000, 2, 29, 3)),
            (951_868_800, moment(2000, 3, 1, 4)),
            (1_709_164_800, moment(2024, 2, 29, 5)),
            (1_735_603_200, moment(2024, 12, 31, 3)),
            (4_107_542_400, moment(2100, 3, 1, 2)),
            (-86_400, moment(1969, 12, 31, 4)),
        ] {
            assert_eq!(Moment::at(seconds), expected);
            assert_eq!(expected.seconds(), seconds);
        }
        let last = Moment::at(1_000_000_000);
        assert_eq!((last.hour, last.minute, last.second), (1, 46, 40));
    }

    #[test]
    fn there_and_back_is_the_same_for_each_day_of_four_centuries() {
        let mut seconds = -2_208_988_800;
        while seconds < 10_413_792_000 {
            assert_eq!(Moment::at(seconds).seconds(), seconds);
            seconds += DAY - 1;
        }
    }

    #[test]
    fn nonsense_gives_some_time() {
        let worst =
            Moment { year: 25_755, month: 255, day: 255, hour: 255, minute: 255, second: 255, weekday: 0 };
        Moment::at(worst.seconds());
        let least = Moment { year: 0, month: 0, day: 0, ..worst };
        Moment::at(least.seconds());
        Moment::at(i64::MIN);
        Moment::at(i64::MAX);
    }
}
